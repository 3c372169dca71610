"""The nftables of a namespace: sets read and changed, transactions, and the thread for them."""

import errno
import json
import os
import socket
import subprocess
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network
from types import MappingProxyType
from typing import Any, TypeVar

from handlers.errors import Failure, Unavailable, of_os_error
from handlers.host.linux.kernel_thread import CALL_S, kernel_thread, no_namespace
from handlers.host.net.chains import GUARD
from handlers.host.net.nft.commits import Commits
from handlers.host.net.nft.elements import (
    ERESTART,
    Element,
    Member,
    answered,
    change_batch,
    change_result,
    plain,
    question,
)
from handlers.host.net.nft.libnftables import (
    JSON,
    STATELESS,
    TERSE,
    Absent,
    Engine,
    NftRefusal,
    open_engine,
    refusal,
)

T = TypeVar("T")
ATTEMPTS, ANSWER_BYTES = 20, 1 << 16
"""To commit for the generation that was looked at, while other programs commit."""


class SetContent:
    """The elements of one set, all and by their first part: a name of a link."""

    def __init__(self, elements: Iterable[Element]) -> None:
        self.elements = set(elements)
        self._by_first: dict[str, set[Element]] = {}
        for element in self.elements:
            self._by_first.setdefault(element[0], set()).add(element)
        self._firsts = sorted(self._by_first)

    def of(self, first: str) -> set[Element]:
        return self._by_first.get(first, set())

    def beginning(self, prefix: str) -> list[Element]:
        """Those whose first part begins so: neighbours in the order of the first parts."""
        found: list[Element] = []
        for place in range(bisect_left(self._firsts, prefix), len(self._firsts)):
            if not self._firsts[place].startswith(prefix):
                break
            found += self._by_first[self._firsts[place]]
        return found

    def add(self, element: Element) -> None:
        self.elements.add(element)
        if element[0] not in self._by_first:
            insort(self._firsts, element[0])
        self._by_first.setdefault(element[0], set()).add(element)

    def discard(self, element: Element) -> None:
        self.elements.discard(element)
        if (found := self._by_first.get(element[0])) is not None:
            found.discard(element)
            if not found:
                del self._by_first[element[0]]
                del self._firsts[bisect_left(self._firsts, element[0])]


class Tables:
    """nftables of the namespace that the calling thread is in. Synchronous; lives in one thread.

    Keeps what it read of a set until another program changes hostd's tables: the kernel reports
    each commit before the program that sent it goes on. So a set of 1,000 elements is not read for
    each change, and yet an out-of-band change is never missed.

    While `guarded`, each set of hostd's tables exists twice, and both copies are read and changed.

    Source: nft(8), nf_tables. Needs: CAP_NET_ADMIN.
    """

    def __init__(self, engine: Engine, *, before: int = 0) -> None:
        """`before`: how many others this worker opened before, so that no number of changes comes
        again."""
        self._engine = engine
        port = None if engine.socket is None else engine.socket.getsockname()[0]
        self._commits = Commits(port, before=before)
        self._changes = 0
        self._members: dict[str, SetContent] = {}
        self.guarded = False

    @property
    def can_own(self) -> bool:
        """Whether a table can be owned: the engine has one socket for as long as it is open."""
        return self._engine.one_socket

    @property
    def port(self) -> int | None:
        """The port ID that all transactions are sent from, if there is one."""
        return self._commits.port

    def close(self) -> None:
        self._engine.close()
        self._commits.close()

    # -- reading -------------------------------------------------------------------------------

    def outside_changes(self) -> int:
        """Increases whenever another program changed hostd's tables in this namespace."""
        now = self._commits.look()
        if now != self._changes:
            self._changes = now
            self._members.clear()
        return self._changes

    def foreign_commits(self) -> int:
        """Increases whenever another program changed any ruleset of this namespace."""
        self.outside_changes()
        return self._commits.any

    def members(self, name: str) -> set[Element]:
        """The elements of a set, e.g. of `inet hostd tenants`; of none if it is absent.

        While guarded, those of either copy.
        """
        self.outside_changes()
        return {element for copy in self._copies(name) for element in self._content(copy).elements}

    def members_of(self, name: str, first: str) -> set[Element]:
        """Those of the elements that begin with this part."""
        self.outside_changes()
        return {element for copy in self._copies(name) for element in self._content(copy).of(first)}

    def members_beginning(self, name: str, prefix: str) -> set[Element]:
        """Those of the elements whose first part begins so."""
        self.outside_changes()
        contents = map(self._content, self._copies(name))
        return {element for content in contents for element in content.beginning(prefix)}

    def present(self, members: Iterable[Member]) -> list[Member]:
        """Those that are there; while guarded, in either copy."""
        self.outside_changes()
        return [
            (name, element)
            for name, element in members
            if any(element in self._content(copy).elements for copy in self._copies(name))
        ]

    def missing(self, members: Iterable[Member]) -> list[Member]:
        """Those that are not there; while guarded, not in both copies."""
        self.outside_changes()
        return [
            (name, element)
            for name, element in members
            if any(element not in self._content(copy).elements for copy in self._copies(name))
        ]

    def has(self, members: Iterable[Member]) -> bool:
        """Whether all of these are there; read from the kernel, not from the cache."""
        copies = self._in_copies(members)
        if (kernel := self._direct(copies)) is not None:
            request, wanted = question(copies)
            found, codes = answered(exchange(kernel, request))
            if codes - {errno.ENOENT}:
                raise failure_of(max(codes), "cannot read nftables elements")
            return found == wanted
        try:
            self._run("".join(f"get element {spelled(member)}\n" for member in copies), 0)
        except Absent:
            return False
        return True

    def read(self, what: str, *, terse: bool = False) -> list[dict[str, Any]]:
        """nft's JSON for `list <what>` without counters' values; absent is an empty list."""
        try:
            output = self._run(f"list {what}\n", JSON | STATELESS | (TERSE if terse else 0))
        except Absent:
            return []
        # libnftables lists and prints again when the ruleset changes while it reads: a line each,
        # of which only the last is of one generation.
        last = output.strip().rpartition("\n")[2]
        objects: list[dict[str, Any]] = json.loads(last)["nftables"] if last else []
        return [entry for entry in objects if "metainfo" not in entry]

    def text(self, table: str, *, terse: bool = True) -> str:
        """nft's text of one table without counters' values, if terse without elements; absent is
        empty.

        Of a table with flags this is the only way: libnftables before 1.0.9 frees their JSON before
        it prints it.
        """
        try:
            output = self._run(f"list table {table}\n", STATELESS | (TERSE if terse else 0))
        except Absent:
            return ""
        # As in `read`: of several listings the last is of one generation.
        return output[max(0, output.rfind(f"table {table} {{")) :]

    # -- changing ------------------------------------------------------------------------------

    def apply(self, text: str) -> None:
        """Commit one transaction.

        Raises:
            Absent: it names something that is not there.
            Unavailable, Exhausted, HostFault: as nft says; nothing has changed.
        """
        self._commit(lambda: self._run(text, 0))
        self._members.clear()

    def change(
        self,
        *,
        remove: Iterable[Member] = (),
        add: Iterable[Member] = (),
        replace: Mapping[str, set[Element]] = MappingProxyType({}),
    ) -> None:
        """Take elements out of sets and put others in, in one transaction.

        One to remove may be absent, one to add may be there. `replace` gives sets a new content: in
        a set of intervals, nft 1.0.6 does not replace an element by one that overlaps it.

        Raises as `apply`.
        """
        gone, come = self._in_copies(remove), self._in_copies(add)
        filled = {copy: new for name, new in replace.items() for copy in self._copies(name)}
        kernel = None if filled else self._direct([*gone, *come])
        if kernel is not None:
            self._commit(lambda: self._send(kernel, gone, come))
        else:
            # Adding first makes deleting one that is absent succeed, in the same transaction.
            lines = [f"{do} element {spelled(m)}" for m in gone for do in ("add", "delete")]
            lines += [f"flush set {name}" for name in filled]
            come += [(name, element) for name, elements in filled.items() for element in elements]
            lines += [f"add element {spelled(member)}" for member in come]
            self._commit(lambda: self._run("\n".join(lines) + "\n", 0))
        for name, element in gone:
            if name in self._members:
                self._members[name].discard(element)
        self._members.update((name, SetContent(elements)) for name, elements in filled.items())
        for name, element in come:
            if name in self._members:
                self._members[name].add(element)

    def _copies(self, name: str) -> tuple[str, ...]:
        """The names of a set's copies: the set itself and, while guarded, that of the guard."""
        return (name, guard_of(name)) if self.guarded else (name,)

    def _in_copies(self, members: Iterable[Member]) -> list[Member]:
        return [(copy, element) for name, element in members for copy in self._copies(name)]

    def _content(self, name: str) -> SetContent:
        if name not in self._members:
            self._members[name] = SetContent(elements_of(self.read(f"set {name}")))
        return self._members[name]

    def _direct(self, members: Sequence[Member]) -> socket.socket | None:
        """The socket on which these members are changed and read without nft's language."""
        return self._engine.socket if self.port is not None and plain(members) else None

    def _send(self, kernel: socket.socket, gone: list[Member], come: list[Member]) -> None:
        """One transaction in nf_tables' own messages, for the ruleset as it was looked at."""
        for _attempt in range(ATTEMPTS):
            batch = change_batch(gone, come, self._commits.generation)
            code = change_result(exchange(kernel, batch))
            if code == 0:
                return
            if code != ERESTART:
                raise failure_of(code or errno.EPROTO, "cannot change nftables elements")
            self.outside_changes()
        raise Unavailable(f"nftables ruleset changed {ATTEMPTS} times meanwhile: try again")

    def _commit(self, send: Callable[[], object]) -> None:
        self.outside_changes()
        try:
            send()
        except Failure:
            self._members.clear()
            raise
        self._commits.committed()
        self.outside_changes()

    def _run(self, text: str, flags: int) -> str:
        try:
            return self._engine.run(text, flags)
        except NftRefusal as error:
            raise refusal(str(error)) from error
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable("cannot run nft: try again") from error


class Nft:
    """The thread in which all nftables work of this worker runs, one function at a time."""

    def __init__(
        self,
        enter: Callable[[], None] = no_namespace,
        open_engine: Callable[[], Engine] = open_engine,
        *,
        limit_s: float = CALL_S,
    ) -> None:
        self._open = open_engine
        self._opened_before = 0
        self._thread = kernel_thread(
            "nftables", enter, self._opened, lambda tables: tables.close(), limit_s=limit_s
        )

    async def run(self, do: Callable[[Tables], T]) -> T:
        """Run `do` in the thread, undisturbed by other nftables work of this worker.

        Raises:
            Abandoned: it did not return in its time; see `call_threads`.
        """
        return await self._thread.run(do)

    @property
    def hangs(self) -> bool:
        """Whether an abandoned call has not returned: its socket owns the guard until then."""
        return self._thread.hung > 0

    async def members(self, name: str) -> frozenset[Element]:
        """The elements of a set, e.g. of `inet hostd tenants`; of none if it is absent."""
        return await self.run(lambda tables: frozenset(tables.members(name)))

    async def outside_changes(self) -> int:
        """Increases whenever another program changed any ruleset of this namespace."""
        return await self.run(lambda tables: tables.outside_changes())

    def close(self) -> None:
        self._thread.stop()

    def _opened(self) -> Tables:
        tables = Tables(self._open(), before=self._opened_before)
        self._opened_before += 1
        return tables


def guard_of(name: str) -> str:
    """`inet hostd_guard tenants` for `inet hostd tenants`."""
    family, _, rest = name.split(" ", 2)
    return f"{family} {GUARD} {rest}"


def exchange(kernel: socket.socket, request: bytes) -> list[bytes]:
    """Send messages; all answers, which nf_tables has queued when the sending returns."""
    answers: list[bytes] = []
    try:
        kernel.send(request)
        while True:
            answers.append(kernel.recv(ANSWER_BYTES, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return answers
    except OSError as error:
        raise of_os_error(error, "cannot talk to nf_tables") from error


def failure_of(code: int, what: str) -> Failure:
    """The failure for an error number of nf_tables."""
    if code == errno.ENOENT:
        return Absent(f"{what}: {os.strerror(code)}")
    return of_os_error(OSError(code, os.strerror(code)), what)


def elements_of(listing: list[dict[str, Any]]) -> list[Element]:
    """The elements in nft's JSON of one set: a plain one has one part, a concatenation several."""
    sets = [body for entry in listing for kind, body in entry.items() if kind == "set"]
    return [parts_of(element) for body in sets for element in body.get("elem", ())]


def parts_of(element: Any) -> Element:
    """The key's parts; statements, e.g. an element's counter, are left out."""
    if isinstance(element, str | int):
        return (str(element),)
    if "elem" in element:
        return parts_of(element["elem"]["val"])
    return tuple(part_of(part) for part in element.get("concat", (element,)))


def part_of(part: Any) -> str:
    """A network as `10.0.0.0/8`, any other range as `10.0.0.1-10.0.0.9`."""
    if isinstance(part, str | int):
        return str(part)
    if "prefix" in part:
        return f"{part['prefix']['addr']}/{part['prefix']['len']}"
    return "-".join(str(end) for end in part["range"])


def spelled(member: Member) -> str:
    """A member in nft's language: `inet hostd services { tcp . 53 }`, names of links quoted."""
    name, (first, *rest) = member
    head = first if first in {"tcp", "udp"} or is_network(first) else f'"{first}"'
    return f"{name} {{ {' . '.join([head, *rest])} }}"


def is_network(text: str) -> bool:
    """Whether nft takes this as addresses and not as the name of a link."""
    try:
        for end in text.split("-"):
            IPv4Network(end)
    except ValueError:
        return False
    return True
