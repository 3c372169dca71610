"""nftables through libnftables in one thread: text in, one atomic transaction per call.

Each call of `apply` is one batch: all of it takes effect or none. Where the library is missing, the
`nft` program is run instead, with the same text. pyroute2's nftables cannot do transactions.
"""

import ctypes
import json
import socket
import subprocess
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from handlers.errors import Exhausted, Failure, HostFault, Unavailable
from handlers.host.errnos import os_failure
from handlers.host.kernel_thread import KernelThread, stay
from handlers.host.netlink_wire import HEADER, attributes

LIBRARY = "libnftables.so.1"
PROGRAM = "nft"
# nftables/libnftables.h, enum nft output flags
STATELESS, JSON, TERSE = 1 << 1, 1 << 4, 1 << 11
ABSENT = "No such file or directory"
TIMEOUT_S = 30.0

NETLINK_NETFILTER = 12
NLM_F_REQUEST = 1
# linux/netfilter/nf_tables.h: subsystem 10, messages 15 and 16
NFT_MSG_NEWGEN, NFT_MSG_GETGEN = (10 << 8) | 15, (10 << 8) | 16
NFTA_GEN_ID = 1

Element = tuple[str, ...]
# A set's family, table and name, and one element of it.
Member = tuple[str, Element]


class Absent(HostFault):
    """The transaction names a table, chain, set or element that is not there."""


class Engine(Protocol):
    """What runs nft's language: the output and error text, or raises NftRefusal."""

    def run(self, text: str, flags: int) -> str: ...

    def close(self) -> None: ...


class NftRefusal(Exception):
    """nft's own message."""


class Library:
    """libnftables by ctypes; one context, not shared between threads.

    Source: libnftables(3). Needs: CAP_NET_ADMIN. The netlink socket is made with the context, so
    it is of the namespace that the thread is in then.
    """

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(LIBRARY)
        self._lib.nft_ctx_new.restype = ctypes.c_void_p
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(self._lib, name).restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._lib.nft_ctx_new(0))
        if self._context.value is None:
            raise HostFault("libnftables gave no context")
        self._lib.nft_ctx_buffer_output(self._context)
        self._lib.nft_ctx_buffer_error(self._context)

    def run(self, text: str, flags: int) -> str:
        self._lib.nft_ctx_output_set_flags(self._context, ctypes.c_uint(flags))
        code = self._lib.nft_run_cmd_from_buffer(self._context, text.encode())
        output: bytes = self._lib.nft_ctx_get_output_buffer(self._context) or b""
        error: bytes = self._lib.nft_ctx_get_error_buffer(self._context) or b""
        if code != 0:
            raise NftRefusal(error.decode(errors="replace"))
        return output.decode()

    def close(self) -> None:
        self._lib.nft_ctx_free(self._context)


class Program:
    """The `nft` program, one process per call. Source: nft(8). Needs: CAP_NET_ADMIN."""

    def run(self, text: str, flags: int) -> str:
        options = [o for f, o in ((STATELESS, "-s"), (JSON, "-j"), (TERSE, "-t")) if flags & f]
        # With -j a file must be JSON, so a question, which is short, goes as an argument.
        source = [text] if flags & JSON else ["-f", "-"]
        done = subprocess.run(  # noqa: S603 - a fixed program, text of our own making
            [PROGRAM, *options, *source],
            input=text,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise NftRefusal(done.stderr)
        return done.stdout

    def close(self) -> None:
        """Nothing is held between calls."""


def open_engine() -> Engine:
    """The library, or else the program.

    Raises:
        HostFault: this host has neither.
    """
    try:
        return Library()
    except OSError:
        pass
    try:
        Program().run("", 0)
    except OSError as error:
        raise HostFault(f"neither {LIBRARY} nor the program {PROGRAM} is installed") from error
    return Program()


class Nft:
    """The thread in which all nftables work of this worker runs.

    Keeps what it read of a set for as long as nobody else changed any ruleset: the kernel counts
    the commits of a namespace, and this object knows its own. So a set of 1,000 elements is not
    read for each change, and yet what another hand did is never overlooked.
    """

    def __init__(
        self,
        enter: Callable[[], None] = stay,
        open_engine: Callable[[], Engine] = open_engine,
    ) -> None:
        self._thread = KernelThread("nftables", enter)
        self._open = open_engine
        self._engine: Engine | None = None
        self._socket: socket.socket | None = None
        self._generation = -1
        self._changes = 0
        self._members: dict[str, set[Element]] = {}

    # -- reading -------------------------------------------------------------------------------

    async def outside_changes(self) -> int:
        """Grows whenever another hand changed any ruleset of this namespace."""
        return await self._thread.run(self._catch_up)

    async def members(self, name: str) -> frozenset[Element]:
        """The elements of a set, e.g. of `inet hostd tenants`; of none if it is absent."""
        return await self._thread.run(lambda: frozenset(self._current_members(name)))

    async def has(self, members: Iterable[Member]) -> bool:
        """Whether all of these are in the kernel's sets; asked of the kernel."""
        wanted = "".join(f"get element {spelled(member)}\n" for member in members)
        try:
            await self._thread.run(lambda: self._run(wanted, 0))
        except Absent:
            return False
        return True

    async def read(self, what: str, *, terse: bool = False) -> list[dict[str, Any]]:
        """nft's JSON for `list <what>` without counters' values; absent is an empty list."""
        return await self._thread.run(lambda: self._read(what, terse=terse))

    # -- changing ------------------------------------------------------------------------------

    async def apply(self, text: str) -> None:
        """Commit one transaction.

        Raises:
            Absent: it names something that is not there.
            Unavailable, Exhausted, HostFault: as nft says; nothing has changed.
        """

        def change() -> None:
            self._members.clear()
            self._commit(text)

        await self._thread.run(change)

    async def change(self, *, remove: Iterable[Member] = (), add: Iterable[Member] = ()) -> None:
        """Take elements out of sets and put others in, in one transaction.

        One to remove may be absent, one to add may be there. Raises as `apply`.
        """
        gone, come = list(remove), list(add)
        # Adding first makes deleting one that is absent succeed, in the same transaction.
        text = "".join(
            f"add element {spelled(member)}\ndelete element {spelled(member)}\n" for member in gone
        ) + "".join(f"add element {spelled(member)}\n" for member in come)

        def change() -> None:
            self._commit(text)
            for name, element in gone:
                self._members.get(name, set()).discard(element)
            for name, element in come:
                if name in self._members:
                    self._members[name].add(element)

        await self._thread.run(change)

    def close(self) -> None:
        self._thread.stop(self._close)

    # -- in the thread -------------------------------------------------------------------------

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._socket is not None:
            self._socket.close()

    def _commit(self, text: str) -> None:
        self._catch_up()
        try:
            self._run(text, 0)
        except Failure:
            self._members.clear()
            raise
        now = self._read_generation()
        if now == next_generation(self._generation):
            self._generation = now
        self._catch_up()

    def _catch_up(self) -> int:
        now = self._read_generation()
        if now != self._generation:
            self._generation = now
            self._changes += 1
            self._members.clear()
        return self._changes

    def _current_members(self, name: str) -> set[Element]:
        self._catch_up()
        if name not in self._members:
            self._members[name] = set(elements_of(self._read(f"set {name}", terse=False)))
        return self._members[name]

    def _read(self, what: str, *, terse: bool) -> list[dict[str, Any]]:
        flags = JSON | STATELESS | (TERSE if terse else 0)
        try:
            output = self._run(f"list {what}\n", flags)
        except Absent:
            return []
        objects: list[dict[str, Any]] = json.loads(output)["nftables"] if output else []
        return [entry for entry in objects if "metainfo" not in entry]

    def _run(self, text: str, flags: int) -> str:
        if self._engine is None:
            self._engine = self._open()
        try:
            return self._engine.run(text, flags)
        except NftRefusal as error:
            raise refusal(str(error)) from error
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable("nft could not be run") from error

    def _read_generation(self) -> int:
        """The number of commits to this namespace's rulesets, by NFT_MSG_GETGEN."""
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
                self._socket.settimeout(TIMEOUT_S)
            self._socket.send(HEADER.pack(20, NFT_MSG_GETGEN, NLM_F_REQUEST, 1, 0) + bytes(4))
            answer = self._socket.recv(4096)
        except OSError as error:
            raise os_failure(error, "read the generation of the ruleset") from error
        kind = HEADER.unpack_from(answer)[1]
        generation = attributes(answer[20:]).get(NFTA_GEN_ID)
        if kind != NFT_MSG_NEWGEN or generation is None:
            raise HostFault("the kernel does not tell the generation of the ruleset")
        return int.from_bytes(generation, "big")


def next_generation(generation: int) -> int:
    """32 bits, and 0 is left out."""
    return (generation + 1) & 0xFFFFFFFF or 1


def refusal(message: str) -> Failure:
    """The failure for what nft printed; its first line is the cause."""
    cause = message.strip().split("\n", 1)[0] or "nft gave no reason"
    if ABSENT in message:
        return Absent(f"nftables: {cause}")
    if "Device or resource busy" in message or "Interrupted system call" in message:
        return Unavailable(f"nftables: {cause}")
    if "Cannot allocate memory" in message or "No buffer space" in message:
        return Exhausted(f"nftables: {cause}")
    return HostFault(f"nftables: {cause}")


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
    return tuple(str(part) for part in element["concat"])


def spelled(member: Member) -> str:
    """A member in nft's language: `inet hostd services { tcp . 53 }`, names of links quoted."""
    name, (first, *rest) = member
    head = first if first in {"tcp", "udp"} else f'"{first}"'
    return f"{name} {{ {' . '.join([head, *rest])} }}"
