"""The changes that each launch and each new tenant makes, as rtnetlink's messages. No I/O.

Spelled here because pyroute2 takes 0.2 ms of CPU for each; what is rare is left to it. Numbers are
those of include/uapi/linux/{rtnetlink,if_link,neighbour}.h.
"""

import socket
import struct
from dataclasses import dataclass

from handlers.host.net.netlink_messages import HEADER, NLM_F_ACK, NLM_F_REQUEST, attribute
from handlers.host.net.rtnetlink_reader import (
    ADDRESS,
    IFA_LOCAL,
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_BR_FORWARD_DELAY,
    IFLA_BR_MCAST_SNOOPING,
    IFLA_BR_STP_STATE,
    IFLA_BRPORT_ISOLATED,
    IFLA_BRPORT_LEARNING,
    IFLA_BRPORT_UNICAST_FLOOD,
    IFLA_IFALIAS,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_INFO_SLAVE_DATA,
    IFLA_LINKINFO,
    IFLA_MASTER,
    LINK,
    NDA_DST,
    NDA_LLADDR,
    NEIGHBOUR,
    NUD_NOARP,
    NUD_PERMANENT,
    Address,
)

NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR = 16, 17, 20, 21
RTM_NEWNEIGH, RTM_DELNEIGH = 28, 29
NTF_MASTER = 0x04
IFA_ADDRESS, IFLA_INFO_SLAVE_KIND = 1, 4
PORT = {
    "isolated": IFLA_BRPORT_ISOLATED,
    "learning": IFLA_BRPORT_LEARNING,
    "unicast_flood": IFLA_BRPORT_UNICAST_FLOOD,
}


@dataclass(frozen=True, slots=True)
class Request:
    """One change, to be confirmed; `what` says what was attempted, the errors `absent` are fine."""

    kind: int
    flags: int
    body: bytes
    what: str
    absent: frozenset[int] = frozenset()

    def with_header(self, sequence: int) -> bytes:
        flags = NLM_F_REQUEST | NLM_F_ACK | self.flags
        return HEADER.pack(HEADER.size + len(self.body), self.kind, flags, sequence, 0) + self.body


def new_bridge(name: str, mac: str) -> Request:
    """A bridge that is down and forwards at once: no STP, no snooping, a MAC that stays."""
    data = attribute(IFLA_BR_STP_STATE, struct.pack("=I", 0))
    data += attribute(IFLA_BR_FORWARD_DELAY, struct.pack("=I", 0))
    data += attribute(IFLA_BR_MCAST_SNOOPING, b"\0")
    info = attribute(IFLA_INFO_KIND, b"bridge\0") + attribute(IFLA_INFO_DATA, data, nested=True)
    body = LINK.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0")
    body += attribute(IFLA_ADDRESS, octets(mac)) + attribute(IFLA_LINKINFO, info, nested=True)
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"add bridge {name}")


def link_change(
    index: int,
    *,
    state: str | None = None,
    master: int | None = None,
    address: str | None = None,
    ifalias: str | None = None,
) -> Request:
    """What is given of a link, in one message."""
    change = 0 if state is None else IFF_UP
    body = LINK.pack(0, 0, index, IFF_UP if state == "up" else 0, change)
    given: list[str] = [] if state is None else ["state"]
    if address is not None:
        body += attribute(IFLA_ADDRESS, octets(address))
        given.append("address")
    if master is not None:
        body += attribute(IFLA_MASTER, struct.pack("=I", master))
        given.append("master")
    if ifalias is not None:
        body += attribute(IFLA_IFALIAS, ifalias.encode() + b"\0")
        given.append("ifalias")
    return Request(RTM_NEWLINK, 0, body, f"set {', '.join(given)} of link {index}")


def port_change(index: int, **flags: int) -> Request:
    """Flags of a bridge port, e.g. `isolated`; old kernels ignore unknown ones."""
    data = b"".join(attribute(PORT[name], bytes([value])) for name, value in flags.items())
    info = attribute(IFLA_INFO_SLAVE_KIND, b"bridge\0")
    info += attribute(IFLA_INFO_SLAVE_DATA, data, nested=True)
    body = LINK.pack(0, 0, index, 0, 0) + attribute(IFLA_LINKINFO, info, nested=True)
    return Request(RTM_NEWLINK, 0, body, f"set {', '.join(flags)} of bridge port {index}")


def new_address(index: int, address: Address) -> Request:
    packed = socket.inet_aton(address.address)
    body = ADDRESS.pack(socket.AF_INET, address.prefix_len, 0, 0, index)
    body += attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
    what = f"add address {address.address}/{address.prefix_len}"
    return Request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body, what)


def new_neighbour(index: int, address: str, mac: str) -> Request:
    body = NEIGHBOUR.pack(socket.AF_INET, index, NUD_PERMANENT, 0, 0)
    body += attribute(NDA_DST, socket.inet_aton(address)) + attribute(NDA_LLADDR, octets(mac))
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, f"add neighbour {address}")


def new_fdb_entry(index: int, mac: str) -> Request:
    """`bridge fdb replace MAC dev PORT master static`: NUD_PERMANENT would mean the host."""
    body = NEIGHBOUR.pack(socket.AF_BRIDGE, index, NUD_NOARP, NTF_MASTER, 0)
    body += attribute(NDA_LLADDR, octets(mac))
    return Request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, f"add FDB entry {mac}")


def no_neighbour(index: int, address: str, gone: frozenset[int]) -> Request:
    body = NEIGHBOUR.pack(socket.AF_INET, index, 0, 0, 0)
    body += attribute(NDA_DST, socket.inet_aton(address))
    return Request(RTM_DELNEIGH, 0, body, f"delete neighbour {address}", gone)


def no_link(index: int, gone: frozenset[int]) -> Request:
    return Request(RTM_DELLINK, 0, LINK.pack(0, 0, index, 0, 0), f"delete link {index}", gone)


def octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
