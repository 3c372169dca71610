"""Reads of rtnetlink: links, addresses, neighbours, FDB entries, routes, filtered by the kernel.

On the socket itself, and by other code than that which writes: so a read-back proves something,
and costs some 30 us where decoding all of a link's hundred attributes costs 500. Numbers are
those of include/uapi/linux/{if_link,if_addr,neighbour,rtnetlink}.h. Changes nothing.
"""

import errno
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from handlers.errors import HostFault, Unavailable, of_os_error
from handlers.host.net.netlink_messages import (
    HEADER,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    Attributes,
    attribute,
    attributes,
    messages,
)

RTM_GETLINK, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE, RTM_GETNEIGH = 18, 22, 24, 26, 30
SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12
LINK, ADDRESS = struct.Struct("=BxHiII"), struct.Struct("=BBBBi")
NEIGHBOUR, ROUTE, HOP = (
    struct.Struct("=BxxxiHBB"),
    struct.Struct("=BBBBBBBBI"),
    struct.Struct("=HBBi"),
)

IFF_UP = 0x1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MASTER, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_EXT_MASK = (
    1,
    3,
    10,
    18,
    20,
    29,
)
IFLA_STATS64, STATS = 23, struct.Struct("=QQQQ")
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_DATA = 1, 2, 5
SKIP_STATS = attribute(IFLA_EXT_MASK, struct.pack("=I", 1 << 3))
# Attributes of Link.info, which are no others: of a bridge, of a TAP
IFLA_BR_FORWARD_DELAY, IFLA_BR_STP_STATE, IFLA_BR_MCAST_SNOOPING = 1, 5, 23
IFLA_TUN_OWNER, IFLA_TUN_PERSIST = 1, 6
# Attributes of Link.port, which are no others
IFLA_BRPORT_STATE, IFLA_BRPORT_LEARNING, IFLA_BRPORT_UNICAST_FLOOD, IFLA_BRPORT_ISOLATED = (
    1,
    8,
    9,
    33,
)

FIELDS = frozenset({IFLA_ADDRESS, IFLA_IFNAME, IFLA_MASTER, IFLA_LINKINFO, IFLA_IFALIAS})
INFO = frozenset(
    {
        IFLA_BR_FORWARD_DELAY,
        IFLA_BR_STP_STATE,
        IFLA_BR_MCAST_SNOOPING,
        IFLA_TUN_OWNER,
        IFLA_TUN_PERSIST,
    }
)
PORT = frozenset(
    {
        IFLA_BRPORT_STATE,
        IFLA_BRPORT_LEARNING,
        IFLA_BRPORT_UNICAST_FLOOD,
        IFLA_BRPORT_ISOLATED,
    }
)

IFA_LOCAL = 2
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
RTA_DST, RTA_OIF, RTA_PRIORITY, RTA_MULTIPATH, RTA_TABLE = 1, 4, 6, 9, 15
RT_TABLE_MAIN = 254
RTM_F_LOOKUP_TABLE, RTM_F_FIB_MATCH = 0x1000, 0x2000
TIMEOUT_S = 10.0
ATTEMPTS = 5
NONE = frozenset({errno.ENODEV, errno.ENOENT, errno.ENXIO})
NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL})
"""The last three are answers of routes: `unreachable`, `prohibit`, `blackhole`."""


@dataclass(frozen=True, slots=True)
class Link:
    """One link as the kernel reports it. `info` and `port` hold the numbers of its kind and, if it
    is a bridge's port, of the port, by attribute."""

    index: int
    name: str
    kind: str
    alias: str
    mac: str
    up: bool
    master: int | None
    info: Mapping[int, int]
    port: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Counters:
    """Of a link since it was made, from the host's side. Source: rtnl_link_stats64, if_link.h."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int


@dataclass(frozen=True, slots=True)
class Address:
    address: str
    prefix_len: int


@dataclass(frozen=True, slots=True)
class Route:
    """An IPv4 route. `links` are the indexes it goes out by; several if it is multipath. `rank` is
    what distinguishes routes of one network and table: type of service, type and metric."""

    dst: str
    table: int
    links: tuple[int, ...]
    rank: tuple[int, int, int] = (0, 0, 0)


class Reader:
    """One socket of the namespace that the calling thread is in. Source: rtnetlink(7)."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0
        self._view = memoryview(bytearray(1 << 17))

    @property
    def port(self) -> int:
        """The socket's port ID: the sender's in messages about what was changed on it."""
        port: int = self._socket.getsockname()[0]
        return port

    def close(self) -> None:
        self._socket.close()

    def link(self, name: str) -> Link | None:
        wanted = attribute(IFLA_IFNAME, name.encode() + b"\0") + SKIP_STATS
        return self._link(0, wanted)

    def counters(self, name: str) -> Counters | None:
        """What went through an interface; None if it does not exist."""
        wanted = attribute(IFLA_IFNAME, name.encode() + b"\0")
        body = self._get(RTM_GETLINK, LINK.pack(0, 0, 0, 0, 0) + wanted, NONE)
        if body is None:
            return None
        return Counters(*STATS.unpack_from(attributes(body[LINK.size :])[IFLA_STATS64]))

    def existing_link(self, name: str) -> Link:
        """The interface of the name, which the caller has created or found before.

        Raises:
            HostFault: it does not exist.
        """
        link = self.link(name)
        if link is None:
            raise HostFault(f"interface {name} is missing after its creation")
        return link

    def link_name(self, index: int) -> str | None:
        link = self._link(index, SKIP_STATS)
        return None if link is None else link.name

    def links(self, *, kind: str = "", master: int = 0) -> list[Link]:
        """Links of one kind or below one master."""
        wanted = SKIP_STATS
        if kind:
            info = attribute(IFLA_INFO_KIND, kind.encode())
            wanted += attribute(IFLA_LINKINFO, info, nested=True)
        if master:
            wanted += attribute(IFLA_MASTER, struct.pack("=I", master))
        found = map(link_of, self._dump(RTM_GETLINK, LINK.pack(0, 0, 0, 0, 0) + wanted))
        return [
            link
            for link in found
            if link.kind == (kind or link.kind) and master in {0, link.master}
        ]

    def addresses(self, index: int) -> list[Address]:
        """IPv4 addresses of a link."""
        request = ADDRESS.pack(socket.AF_INET, 0, 0, 0, index)
        found: list[Address] = []
        for body in self._dump(RTM_GETADDR, request):
            _, prefix_len, _, _, owner = ADDRESS.unpack_from(body)
            local = attributes(body[ADDRESS.size :]).get(IFA_LOCAL)
            if owner == index and local is not None:
                found.append(Address(socket.inet_ntoa(local), prefix_len))
        return found

    def permanent_neighbours(self, index: int) -> dict[str, str]:
        """Address to MAC of the IPv4 permanent neighbours of an interface."""
        request = NEIGHBOUR.pack(socket.AF_INET, 0, 0, 0, 0)
        request += attribute(NDA_IFINDEX, struct.pack("=I", index))
        found: dict[str, str] = {}
        for body in self._dump(RTM_GETNEIGH, request):
            _, owner, state, _, _ = NEIGHBOUR.unpack_from(body)
            held = attributes(body[NEIGHBOUR.size :])
            if owner == index and state & NUD_PERMANENT and NDA_LLADDR in held:
                found[socket.inet_ntoa(held[NDA_DST])] = held[NDA_LLADDR].hex(":")
        return found

    def neighbour(self, index: int, address: str) -> str | None:
        """The MAC of a permanent neighbour, or None."""
        wanted = attribute(NDA_DST, socket.inet_aton(address))
        found = self._neighbour(socket.AF_INET, index, wanted)
        if found is None or not found[1] & NUD_PERMANENT:
            return None
        return found[2].get(NDA_LLADDR, b"").hex(":")

    def has_static_fdb(self, index: int, mac: str) -> bool:
        """Whether the bridge sends frames for the MAC to this port, by a static entry."""
        wanted = attribute(NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
        found = self._neighbour(socket.AF_BRIDGE, index, wanted)
        return found is not None and found[:2] == (index, NUD_NOARP)

    def routes(self, *, link: int = 0, table: int = 0) -> list[Route]:
        """IPv4 routes: all, or those of a link or a table. `0.0.0.0/0` is the default route."""
        request = ROUTE.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
        request += attribute(RTA_OIF, struct.pack("=I", link)) if link else b""
        request += attribute(RTA_TABLE, struct.pack("=I", table)) if table else b""
        found = map(route_of, self._dump(RTM_GETROUTE, request))
        return [
            route
            for route in found
            if (not link or link in route.links) and table in {0, route.table}
        ]

    def all_addresses(self) -> dict[int, list[Address]]:
        """IPv4 addresses by the index of their link."""
        found: dict[int, list[Address]] = {}
        for body in self._dump(RTM_GETADDR, ADDRESS.pack(socket.AF_INET, 0, 0, 0, 0)):
            _, prefix_len, _, _, owner = ADDRESS.unpack_from(body)
            if (local := attributes(body[ADDRESS.size :]).get(IFA_LOCAL)) is not None:
                found.setdefault(owner, []).append(Address(socket.inet_ntoa(local), prefix_len))
        return found

    def all_permanent_neighbours(self) -> dict[tuple[int, str], str]:
        """MAC by index of the link and address, of the IPv4 permanent neighbours."""
        found: dict[tuple[int, str], str] = {}
        for body in self._dump(RTM_GETNEIGH, NEIGHBOUR.pack(socket.AF_INET, 0, 0, 0, 0)):
            _, owner, state, _, _ = NEIGHBOUR.unpack_from(body)
            held = attributes(body[NEIGHBOUR.size :])
            if state & NUD_PERMANENT and NDA_LLADDR in held:
                found[owner, socket.inet_ntoa(held[NDA_DST])] = held[NDA_LLADDR].hex(":")
        return found

    def all_static_fdb(self) -> list[tuple[int, str]]:
        """Index of the port and MAC of the bridges' static entries."""
        found: list[tuple[int, str]] = []
        for body in self._dump(RTM_GETNEIGH, NEIGHBOUR.pack(socket.AF_BRIDGE, 0, 0, 0, 0)):
            _, owner, state, _, _ = NEIGHBOUR.unpack_from(body)
            if state == NUD_NOARP:
                mac = attributes(body[NEIGHBOUR.size :]).get(NDA_LLADDR, b"")
                found.append((owner, mac.hex(":")))
        return found

    def route_to(self, address: str) -> Route | None:
        """The route by which the host reaches an address, of any table that its rules lead to, as
        it is in that table; None if there is none. A lookup: no other route is looked at."""
        flags = RTM_F_LOOKUP_TABLE | RTM_F_FIB_MATCH
        request = ROUTE.pack(socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, flags)
        request += attribute(RTA_DST, socket.inet_aton(address))
        body = self._get(RTM_GETROUTE, request, NO_ROUTE)
        return None if body is None else route_of(body)

    # -- asking --------------------------------------------------------------------------------

    def _link(self, index: int, wanted: bytes) -> Link | None:
        body = self._get(RTM_GETLINK, LINK.pack(0, 0, index, 0, 0) + wanted, NONE)
        return None if body is None else link_of(body)

    def _neighbour(
        self, family: int, index: int, wanted: bytes
    ) -> tuple[int, int, Attributes] | None:
        # EINVAL: the interface is not a bridge port, so it has no entry.
        request = NEIGHBOUR.pack(family, index, 0, 0, 0) + wanted
        body = self._get(RTM_GETNEIGH, request, NONE | {errno.EINVAL})
        if body is None:
            return None
        _, owner, state, _, _ = NEIGHBOUR.unpack_from(body)
        return owner, state, attributes(body[NEIGHBOUR.size :])

    def _get(self, kind: int, request: bytes, none: frozenset[int]) -> bytes | None:
        """One object; None if the kernel's error is one of `none`."""
        self._send(kind, NLM_F_REQUEST, request)
        for answer, _flags, body in self._receive():
            if answer != NLMSG_ERROR:
                return body
            code = error_of(body)
            if code not in none:
                raise of_os_error(OSError(code, ""), f"rtnetlink request {kind} failed")
        return None

    def _dump(self, kind: int, request: bytes) -> list[bytes]:
        """All objects; asked again when they changed while they were listed."""
        for _attempt in range(ATTEMPTS):
            self._send(kind, NLM_F_REQUEST | NLM_F_DUMP, request)
            if (found := self._whole_dump(kind)) is not None:
                return found
        raise Unavailable(f"rtnetlink dump interrupted by changes {ATTEMPTS} times: try again")

    def _whole_dump(self, kind: int) -> list[bytes] | None:
        found: list[bytes] = []
        whole = True
        while True:
            for answer, flags, body in self._receive():
                whole = whole and not flags & NLM_F_DUMP_INTR
                if answer == NLMSG_DONE:
                    return found if whole else None
                if answer == NLMSG_ERROR:
                    if (code := error_of(body)) in NONE:
                        return []
                    raise of_os_error(OSError(code, ""), f"rtnetlink dump {kind} failed")
                found.append(body)

    def _next_sequence(self) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return self._sequence

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        sequence = self._next_sequence()
        self._send_all(HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body)

    def _send_all(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise of_os_error(error, "cannot send to rtnetlink") from error

    def _acknowledged(self, requests: Sequence[bytes]) -> list[int]:
        """Send requests, which have the last sequence numbers, in one go; the error number of each,
        0 for success. The kernel goes through them in order, also after an error."""
        codes: dict[int, int] = {}
        asked = [HEADER.unpack_from(request)[3] for request in requests]
        if asked:
            self._send_all(b"".join(requests))
        while len(codes) < len(asked):
            for kind, _flags, sequence, body in messages(self._datagram()):
                if kind == NLMSG_ERROR and sequence in asked:
                    codes[sequence] = error_of(body)
        return [codes[sequence] for sequence in asked]

    def _receive(self) -> list[tuple[int, int, bytes]]:
        """One datagram's messages that answer the last question."""
        return [
            (kind, flags, body)
            for kind, flags, sequence, body in messages(self._datagram())
            if sequence == self._sequence
        ]

    def _datagram(self) -> bytes:
        try:
            return bytes(self._view[: self._socket.recv_into(self._view)])
        except TimeoutError as error:
            raise Unavailable(
                f"no reply from rtnetlink within {TIMEOUT_S:g} s: try again"
            ) from error
        except OSError as error:
            raise of_os_error(error, "cannot receive from rtnetlink") from error


def error_of(body: bytes) -> int:
    code: int = struct.unpack_from("=i", body)[0]
    return -code


def link_of(body: bytes, *, nested: bool = True) -> Link:
    """Without `nested`, `kind`, `info` and `port` are left out: they are most of a message."""
    _, _, index, flags, _ = LINK.unpack_from(body)
    held = attributes(body[LINK.size :], FIELDS)
    info = attributes(held.get(IFLA_LINKINFO, b"")) if nested else {}
    master = held.get(IFLA_MASTER)
    return Link(
        index=index,
        name=text(held.get(IFLA_IFNAME, b"")),
        kind=text(info.get(IFLA_INFO_KIND, b"")),
        alias=text(held.get(IFLA_IFALIAS, b"")),
        mac=held.get(IFLA_ADDRESS, b"").hex(":"),
        up=bool(flags & IFF_UP),
        master=None if master is None else number(master),
        info=numbers(info.get(IFLA_INFO_DATA, b""), INFO),
        port=numbers(info.get(IFLA_INFO_SLAVE_DATA, b""), PORT),
    )


def route_of(body: bytes) -> Route:
    _, dst_len, _, tos, table, _, _, type_, _ = ROUTE.unpack_from(body)
    held = attributes(body[ROUTE.size :])
    links = [number(held[RTA_OIF])] if RTA_OIF in held else []
    hops = held.get(RTA_MULTIPATH, b"")
    while len(hops) >= HOP.size:
        size, _, _, index = HOP.unpack_from(hops)
        links.append(index)
        hops = hops[max(HOP.size, (size + 3) & ~3) :]
    return Route(
        dst=f"{socket.inet_ntoa(held.get(RTA_DST, bytes(4)))}/{dst_len}",
        table=number(held[RTA_TABLE]) if RTA_TABLE in held else table,
        links=tuple(links),
        rank=(tos, type_, number(held.get(RTA_PRIORITY, b""))),
    )


def text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def number(value: bytes) -> int:
    return int.from_bytes(value, "little")


def numbers(nest: bytes, wanted: frozenset[int]) -> dict[int, int]:
    """The wanted ones of some 40 attributes."""
    read = int.from_bytes
    return {kind: read(value, "little") for kind, value in attributes(nest, wanted).items()}
