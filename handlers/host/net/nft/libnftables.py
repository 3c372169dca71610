"""nft's language, run by libnftables or, where that is missing, by the `nft` program.

Each call is one batch: all of it takes effect or none. pyroute2's nftables cannot do transactions.
"""

import ctypes
import os
import socket
import stat
import subprocess
from typing import ClassVar, Protocol

from handlers.errors import Exhausted, Failure, HostFault, Unavailable

LIBRARY = "libnftables.so.1"
PROGRAM = "nft"
# nftables/libnftables.h, enum nft output flags
STATELESS, JSON, TERSE = 1 << 1, 1 << 4, 1 << 11
DESCRIPTORS, NETLINK_NETFILTER = "/proc/self/fd", 12
ABSENT = "No such file or directory"
TIMEOUT_S = 30.0


class Absent(HostFault):
    """The transaction names a table, chain, set or element that does not exist."""


class Engine(Protocol):
    """What runs nft's language: the output and error text, or raises NftRefusal.

    `one_socket`: all its transactions are sent on one netlink socket, so that it can own tables.
    `socket` is a duplicate of that socket, if it was found: for messages between two calls.
    """

    one_socket: ClassVar[bool]
    socket: socket.socket | None

    def run(self, text: str, flags: int) -> str: ...

    def close(self) -> None: ...


class NftRefusal(Exception):
    """nft's own message."""


def is_there() -> bool:
    """Whether the library is installed."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


class Library:
    """libnftables by ctypes; one context, not shared between threads.

    Source: libnftables(3). Needs: CAP_NET_ADMIN. The netlink socket is made with the context, so
    it is of the namespace that the thread is in then, and owns the tables with `flags owner`.
    """

    one_socket: ClassVar[bool] = True

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(LIBRARY)
        self._lib.nft_ctx_new.restype = ctypes.c_void_p
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(self._lib, name).restype = ctypes.c_char_p
        before = netfilter_sockets()
        self._context = ctypes.c_void_p(self._lib.nft_ctx_new(0))
        if self._context.value is None:
            raise HostFault(f"{LIBRARY}: nft_ctx_new() failed")
        self.socket = duplicate_of_one(netfilter_sockets() - before)
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
        if self.socket is not None:
            self.socket.close()


class Program:
    """The `nft` program, one process per call. Source: nft(8). Needs: CAP_NET_ADMIN."""

    one_socket: ClassVar[bool] = False

    def __init__(self) -> None:
        self.socket: socket.socket | None = None

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


def netfilter_sockets() -> set[int]:
    """The descriptors of this process that are netlink sockets of netfilter."""
    found: set[int] = set()
    for descriptor in map(int, os.listdir(DESCRIPTORS)):
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with duplicate(descriptor) as each:
                if each.family == socket.AF_NETLINK and each.proto == NETLINK_NETFILTER:
                    found.add(descriptor)
        except OSError:
            continue  # closed by another thread meanwhile
    return found


def duplicate_of_one(descriptors: set[int]) -> socket.socket | None:
    """A duplicate of the socket, with a port ID, if there is only one: another thread may just have
    opened one.

    That it is the right one is proven by the first commit (`commits`).
    """
    if len(descriptors) != 1:
        return None
    found = duplicate(descriptors.pop())
    if not found.getsockname()[0]:
        found.bind((0, 0))
    return found


def duplicate(descriptor: int) -> socket.socket:
    """Raises OSError: another thread has closed the socket; the number may be another file's."""
    own = os.dup(descriptor)
    try:
        return socket.socket(fileno=own)
    except BaseException:
        os.close(own)
        raise


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
