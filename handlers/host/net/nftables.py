"""The nftables of a namespace: sets read and changed, transactions, and the thread for them."""

import json
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Network
from types import MappingProxyType
from typing import Any, TypeVar

from handlers.errors import Failure, HostFault, Unavailable, of_os_error
from handlers.host.linux.kernel_thread import KernelThread, no_namespace
from handlers.host.net.libnftables import (
    JSON,
    STATELESS,
    TERSE,
    TIMEOUT_S,
    Absent,
    Engine,
    NftRefusal,
    open_engine,
    refusal,
)
from handlers.host.net.netlink_messages import HEADER, NLM_F_REQUEST, attributes

T = TypeVar("T")
NETLINK_NETFILTER = 12
# linux/netfilter/nf_tables.h: subsystem 10, messages 15 and 16
NFT_MSG_NEWGEN, NFT_MSG_GETGEN = (10 << 8) | 15, (10 << 8) | 16
NFTA_GEN_ID = 1

Element = tuple[str, ...]
# A set's family, table and name, and one element of it.
Member = tuple[str, Element]
TABLE, GUARD = "hostd", "hostd_guard"


class Tables:
    """nftables of the namespace that the calling thread is in. Synchronous; lives in one thread.

    Keeps what it read of a set until another program changes any ruleset: the kernel counts
    the commits of a namespace, and this object knows its own. So a set of 1,000 elements is not
    read for each change, and yet an out-of-band change is never missed.

    While `guarded`, each set of hostd's tables exists twice, and both copies are read and changed.

    Source: nft(8), nf_tables' NFT_MSG_GETGEN. Needs: CAP_NET_ADMIN.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.settimeout(TIMEOUT_S)
        self._generation = -1
        self._changes = 0
        self._members: dict[str, set[Element]] = {}
        self.guarded = False

    @property
    def can_own(self) -> bool:
        """Whether a table can be owned: the engine has one socket for as long as it is open."""
        return self._engine.one_socket

    def close(self) -> None:
        self._engine.close()
        self._socket.close()

    # -- reading -------------------------------------------------------------------------------

    def outside_changes(self) -> int:
        """Increases whenever another program changed any ruleset of this namespace."""
        now = self._read_generation()
        if now != self._generation:
            self._generation = now
            self._changes += 1
            self._members.clear()
        return self._changes

    def members(self, name: str) -> set[Element]:
        """The elements of a set, e.g. of `inet hostd tenants`; of none if it is absent.

        While guarded, those of either copy.
        """
        self.outside_changes()
        return {element for copy in self._copies(name) for element in self._elements(copy)}

    def missing(self, members: Iterable[Member]) -> list[Member]:
        """Those that are not there; while guarded, not in both copies."""
        self.outside_changes()
        return [
            (name, element)
            for name, element in members
            if any(element not in self._elements(copy) for copy in self._copies(name))
        ]

    def has(self, members: Iterable[Member]) -> bool:
        """Whether all of these are there; read from the kernel, not from the cache."""
        copies = self._in_copies(members)
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

    # -- changing ------------------------------------------------------------------------------

    def apply(self, text: str) -> None:
        """Commit one transaction.

        Raises:
            Absent: it names something that is not there.
            Unavailable, Exhausted, HostFault: as nft says; nothing has changed.
        """
        self._commit(text)
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
        # Adding first makes deleting one that is absent succeed, in the same transaction.
        lines = [f"{do} element {spelled(m)}" for m in gone for do in ("add", "delete")]
        filled = {copy: new for name, new in replace.items() for copy in self._copies(name)}
        lines += [f"flush set {name}" for name in filled]
        come += [(name, element) for name, elements in filled.items() for element in elements]
        lines += [f"add element {spelled(member)}" for member in come]
        self._commit("\n".join(lines) + "\n")
        for name, element in gone:
            self._members.get(name, set()).discard(element)
        self._members.update((name, set(elements)) for name, elements in filled.items())
        for name, element in come:
            if name in self._members:
                self._members[name].add(element)

    def _copies(self, name: str) -> tuple[str, ...]:
        """The names of a set's copies: the set itself and, while guarded, that of the guard."""
        return (name, guard_of(name)) if self.guarded else (name,)

    def _in_copies(self, members: Iterable[Member]) -> list[Member]:
        return [(copy, element) for name, element in members for copy in self._copies(name)]

    def _elements(self, name: str) -> set[Element]:
        if name not in self._members:
            self._members[name] = set(elements_of(self.read(f"set {name}")))
        return self._members[name]

    def _commit(self, text: str) -> None:
        self.outside_changes()
        try:
            self._run(text, 0)
        except Failure:
            self._members.clear()
            raise
        if self._read_generation() == next_generation(self._generation):
            self._generation = next_generation(self._generation)
        self.outside_changes()

    def _run(self, text: str, flags: int) -> str:
        try:
            return self._engine.run(text, flags)
        except NftRefusal as error:
            raise refusal(str(error)) from error
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable("cannot run nft: try again") from error

    def _read_generation(self) -> int:
        """The number of commits to this namespace's rulesets."""
        try:
            self._socket.send(HEADER.pack(20, NFT_MSG_GETGEN, NLM_F_REQUEST, 1, 0) + bytes(4))
            answer = self._socket.recv(4096)
        except OSError as error:
            raise of_os_error(error, "cannot read nftables ruleset generation") from error
        generation = attributes(answer[HEADER.size + 4 :]).get(NFTA_GEN_ID)
        if HEADER.unpack_from(answer)[1] != NFT_MSG_NEWGEN or generation is None:
            raise HostFault(
                "cannot read nftables ruleset generation: unexpected reply from the kernel"
            )
        return int.from_bytes(generation, "big")


class Nft:
    """The thread in which all nftables work of this worker runs, one function at a time."""

    def __init__(
        self,
        enter: Callable[[], None] = no_namespace,
        open_engine: Callable[[], Engine] = open_engine,
    ) -> None:
        self._thread = KernelThread("nftables", enter)
        self._open = open_engine
        self._tables: Tables | None = None

    async def run(self, do: Callable[[Tables], T]) -> T:
        """Run `do` in the thread, undisturbed by other nftables work of this worker."""
        return await self._thread.run(lambda: do(self._opened()))

    async def members(self, name: str) -> frozenset[Element]:
        """The elements of a set, e.g. of `inet hostd tenants`; of none if it is absent."""
        return await self.run(lambda tables: frozenset(tables.members(name)))

    async def outside_changes(self) -> int:
        """Increases whenever another program changed any ruleset of this namespace."""
        return await self.run(lambda tables: tables.outside_changes())

    def close(self) -> None:
        self._thread.stop(self._close)

    def _close(self) -> None:
        if self._tables is not None:
            self._tables.close()

    def _opened(self) -> Tables:
        if self._tables is None:
            self._tables = Tables(self._open())
        return self._tables


def guard_of(name: str) -> str:
    """`inet hostd_guard tenants` for `inet hostd tenants`."""
    family, _, rest = name.split(" ", 2)
    return f"{family} {GUARD} {rest}"


def next_generation(generation: int) -> int:
    """32 bits, and 0 is left out."""
    return (generation + 1) & 0xFFFFFFFF or 1


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
