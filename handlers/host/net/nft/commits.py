"""Who changed nf_tables: a listener to the commits of a namespace, asked and never waited for.

The kernel queues the messages of a commit before the committing program gets its answer. So whoever
reads what is queued, knows of each commit that was complete before; what is lost is reported as
ENOBUFS and counts as a change of everything.
"""

import errno
import socket

from handlers.errors import HostFault, of_os_error
from handlers.host.net.chains import GUARD, TABLE
from handlers.host.net.netlink_messages import HEADER, NLM_F_REQUEST, attributes, pieces
from handlers.host.net.rtnetlink_reader import SOL_NETLINK
from handlers.host.net.socket_filter import attach, drop_all_of_port_but

NETLINK_NETFILTER = 12
NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES = 1, 7
SO_RCVBUFFORCE, BUFFER_BYTES = 33, 1 << 20
# linux/netfilter/nf_tables.h: subsystem 10, messages 15 and 16
NFT_MSG_NEWGEN, NFT_MSG_GETGEN = (10 << 8) | 15, (10 << 8) | 16
NFTA_GEN_ID, NFTA_TABLE = 1, 1
"""Of every message but the generation's, attribute 1 is the table's name."""

GENERIC_BYTES = 4
OURS = (TABLE.encode() + b"\0", GUARD.encode() + b"\0")
DATAGRAM_BYTES = 1 << 17
TIMEOUT_S = 10.0


def rules_listener() -> socket.socket:
    """A socket, not blocking, to which the kernel sends all changes of nf_tables.

    Needs: CAP_NET_ADMIN. Source: nf_tables' NFT_MSG_NEWGEN notification.
    """
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    listener.bind((0, 0))  # without a port ID it receives nothing
    listener.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
    return listener


class Commits:
    """Counts the commits of other programs; `generation` is that of the last commit.

    Lives in one thread. `port` is the port ID of the socket that all of hostd's commits are sent
    on; None if each is sent by a process of its own.
    """

    def __init__(self, port: int | None, *, before: int = 0) -> None:
        self._listener = rules_listener()
        self.port = port
        if port is not None:
            attach(self._listener, drop_all_of_port_but(port, NFT_MSG_NEWGEN))
        self._buffer = bytearray(DATAGRAM_BYTES)
        self._view = memoryview(self._buffer)
        self.generation = read_generation()
        self.of_hostd = self.any = 1 + (before << 32)

    def close(self) -> None:
        self._listener.close()

    def look(self) -> int:
        """Increases whenever another program changed hostd's tables."""
        self._take_in()
        return self.of_hostd

    def committed(self) -> None:
        """hostd has just committed one transaction, before which it looked."""
        before = self.of_hostd, self.any
        commits, own = self._take_in()
        if self.port is None:
            if commits == 1:  # nobody else's
                self.of_hostd, self.any = before
        elif not own:  # it was sent on another socket: from now on, each is told by its number
            self.port = None
            self.of_hostd += 1

    def _take_in(self) -> tuple[int, int]:
        """Read what is queued; how many commits that was, and how many of them hostd's."""
        commits = own = 0
        touched = False
        while (size := self._receive()) is not None:
            if not size:
                self.generation = read_generation()
                touched = True
                commits += 1
            for kind, sender, body in pieces(bytes(self._view[:size])):
                if kind == NFT_MSG_NEWGEN:
                    self.generation = generation_in(body)
                    commits += 1
                    own += sender == self.port
                else:
                    touched = touched or names_hostd(body)
        self.of_hostd += touched
        self.any += commits > own
        return commits, own

    def _receive(self) -> int | None:
        """The size of the next datagram, 0 if the kernel lost some, None if there is none."""
        try:
            return self._listener.recv_into(self._buffer)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return 0
            raise of_os_error(error, "cannot read nftables notifications") from error


def names_hostd(body: bytes) -> bool:
    """Whether a notification is about hostd's tables."""
    size = int.from_bytes(body[4:6], "little")
    return body[6:8] == b"\1\0" and body[8 : 4 + size] in OURS


def generation_in(body: bytes) -> int:
    generation = attributes(body[GENERIC_BYTES:]).get(NFTA_GEN_ID)
    if generation is None:
        raise HostFault("nftables: unexpected message from the kernel: a generation without number")
    return int.from_bytes(generation, "big")


def read_generation() -> int:
    """The number of commits to this namespace's rulesets."""
    request = HEADER.pack(HEADER.size + GENERIC_BYTES, NFT_MSG_GETGEN, NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as asking:
        asking.settimeout(TIMEOUT_S)
        try:
            asking.send(request + bytes(GENERIC_BYTES))
            answer = asking.recv(4096)
        except OSError as error:
            raise of_os_error(error, "cannot read nftables ruleset generation") from error
    for kind, _sender, body in pieces(answer):
        if kind == NFT_MSG_NEWGEN:
            return generation_in(body)
    raise HostFault("cannot read nftables ruleset generation: unexpected reply from the kernel")
