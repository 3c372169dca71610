"""Questions about one thing that the kernel answers without listing the others. Changes nothing.

rtnetlink has no such question for a bridge's ports nor for a table's default routes: its filters
only shorten the answer, while the kernel still walks all links, or routes, of the namespace.
"""

import errno
import fcntl
import socket
import struct
from array import array

from handlers.errors import Unavailable, of_os_error
from handlers.host.net.netlink_messages import (
    HEADER,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    attribute,
    messages,
)
from handlers.host.net.rtnetlink_reader import (
    ATTEMPTS,
    NETLINK_GET_STRICT_CHK,
    ROUTE,
    RTA_TABLE,
    RTM_GETROUTE,
    SOL_NETLINK,
    TIMEOUT_S,
    Link,
    Reader,
    Route,
    error_of,
    route_of,
)

CHUNK_BYTES = 1 << 16
SMALLEST = 1
"""Of a receive buffer: the kernel makes it some 2 KiB, and a chunk it sends is 4 KiB."""
NOWHERE = "0.0.0.0/"
SEQUENCE = 1
# linux/sockios.h, linux/if_bridge.h
SIOCDEVPRIVATE, BRCTL_GET_PORT_LIST, PORTS_MAX = 0x89F0, 7, 1024
IFREQ = struct.Struct("16sP16x")
UNKNOWN = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL})


def default_routes(table: int) -> list[Route]:
    """IPv4 routes to everywhere of a table, in the namespace that the calling thread is in.

    The kernel lists routes by address, from 0.0.0.0 on (fib_trie.c: it resumes a listing at the
    address after the last), so they come first; the rest is not read, by closing the socket.
    """
    for _attempt in range(ATTEMPTS):
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asking:
                found = _first_routes(asking, table)
        except TimeoutError as error:
            raise Unavailable(
                f"no reply from rtnetlink within {TIMEOUT_S:g} s: try again"
            ) from error
        except OSError as error:
            raise of_os_error(error, "cannot read the default routes") from error
        if found is not None:
            return [route for route in found if route.dst == f"{NOWHERE}0"]
    raise Unavailable(f"rtnetlink dump interrupted by changes {ATTEMPTS} times: try again")


def _first_routes(asking: socket.socket, table: int) -> list[Route] | None:
    """Those that begin at 0.0.0.0; None if routes changed meanwhile.

    Each chunk, of some 60 routes, is looked at before it is taken: a chunk that is taken, or fits
    into the buffer beside another, makes the kernel fill the next.
    """
    body = ROUTE.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
    body += attribute(RTA_TABLE, struct.pack("=I", table))
    header = HEADER.pack(
        HEADER.size + len(body), RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP, SEQUENCE, 0
    )
    asking.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
    asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALLEST)
    asking.settimeout(TIMEOUT_S)
    asking.send(header + body)
    found: list[Route] = []
    while True:
        for kind, flags, _sequence, answer in messages(asking.recv(CHUNK_BYTES, socket.MSG_PEEK)):
            if flags & NLM_F_DUMP_INTR:
                return None
            if kind == NLMSG_DONE:
                return found
            if kind == NLMSG_ERROR:
                return _none_or_raise(error_of(answer))
            route = route_of(answer)
            if not route.dst.startswith(NOWHERE):
                return found
            found += [route] if route.table == table else []
        asking.recv(CHUNK_BYTES)


def _none_or_raise(code: int) -> list[Route]:
    """For an error number of the kernel: a table that does not exist has no routes."""
    if code != errno.ENOENT:
        raise OSError(code, "")
    return []


def port_names(kernel: Reader, bridge: Link) -> list[str]:
    """Names of the links below a bridge, in order.

    By bridge(4)'s old ioctl, which costs 0.02 ms where a listing of 700 links takes 0.2 to 0.4;
    a kernel without it is asked for that listing.
    """
    indexes = _port_indexes(bridge)
    if indexes is None:
        return sorted(port.name for port in kernel.links(master=bridge.index))
    names = map(kernel.link_name, indexes)
    return sorted(name for name in names if name is not None)


def _port_indexes(bridge: Link) -> set[int] | None:
    """None where the kernel does not know the question. Never asked of another kind of link: each
    driver has its own meaning for the request."""
    if bridge.kind != "bridge":
        return None
    ports = array("i", bytes(4 * PORTS_MAX))
    arguments = array("L", (BRCTL_GET_PORT_LIST, ports.buffer_info()[0], PORTS_MAX, 0))
    request = IFREQ.pack(bridge.name.encode(), arguments.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking, SIOCDEVPRIVATE, request)
        except OSError as error:
            if error.errno == errno.ENODEV:  # gone meanwhile
                return set()
            if error.errno in UNKNOWN:
                return None
            raise of_os_error(error, f"cannot list the ports of {bridge.name}") from error
    return set(ports) - {0}
