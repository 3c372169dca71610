"""Connection tracking entries of one subnet: read and deleted over ctnetlink, nothing else.

Written on the socket itself: the tables of a busy host hold some 100,000 entries, of which only
the addresses matter here, and a tuple is best deleted by the bytes the kernel gave for it.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

from handlers.errors import Unavailable, of_os_error
from handlers.host.net.netlink_messages import (
    HEADER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    Attributes,
    attribute,
    attributes,
    messages,
)

# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
NETLINK_NETFILTER = 12
CT_GET, CT_DELETE = (1 << 8) | 1, (1 << 8) | 2
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID, CTA_ZONE = 1, 2, 12, 18
CTA_TUPLE_IP, CTA_IP_V4_SRC, CTA_IP_V4_DST = 1, 1, 2
FAMILY = struct.pack("=BBH", socket.AF_INET, 0, 0)
TIMEOUT_S = 10.0


def flush_conntrack(subnet: IPv4Network) -> int:
    """Delete all entries with an address of the subnet on any side; returns how many.

    Source: nfnetlink(7), nf_conntrack_netlink.c. Needs: CAP_NET_ADMIN. Blocks: one table walk.
    """
    with open_socket() as ctnetlink:
        doomed = [
            entry for entry in read_entries(ctnetlink, subnet) if touches_subnet(entry, subnet)
        ]
        return sum(delete_entry(ctnetlink, entry) for entry in doomed)


def open_socket() -> socket.socket:
    ctnetlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    ctnetlink.settimeout(TIMEOUT_S)
    return ctnetlink


def read_entries(ctnetlink: socket.socket, subnet: IPv4Network) -> Iterator[Attributes]:
    """The IPv4 entries of the namespace that may touch the subnet.

    Entries that cannot are left out by the bytes that all its addresses begin with: decoding a
    full table of 200,000 takes over a second.
    """
    prefix = subnet.network_address.packed[: subnet.prefixlen // 8]
    send_request(ctnetlink, CT_GET, NLM_F_REQUEST | NLM_F_DUMP, b"")
    for kind, body in replies(ctnetlink):
        if kind == NLMSG_DONE:
            return
        if prefix in body:
            yield attributes(body[len(FAMILY) :])


def touches_subnet(entry: Attributes, subnet: IPv4Network) -> bool:
    first, last = int(subnet.network_address), int(subnet.broadcast_address)
    for side in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY):
        addresses = attributes(attributes(entry.get(side, b"")).get(CTA_TUPLE_IP, b""))
        for which in (CTA_IP_V4_SRC, CTA_IP_V4_DST):
            if which in addresses and first <= int(IPv4Address(addresses[which])) <= last:
                return True
    return False


def delete_entry(ctnetlink: socket.socket, entry: Attributes) -> bool:
    """Delete one entry by its own tuple; false if it had expired already."""
    wanted = b"".join(
        attribute(kind, entry[kind], nested=kind == CTA_TUPLE_ORIG)
        for kind in (CTA_TUPLE_ORIG, CTA_ID, CTA_ZONE)
        if kind in entry
    )
    send_request(ctnetlink, CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, wanted)
    for _kind, body in replies(ctnetlink):
        code: int = -struct.unpack_from("=i", body)[0]
        if code not in {0, errno.ENOENT}:
            raise of_os_error(OSError(code, ""), "cannot delete a conntrack entry")
        return code == 0
    return False


def send_request(ctnetlink: socket.socket, kind: int, flags: int, body: bytes) -> None:
    size = HEADER.size + len(FAMILY) + len(body)
    ctnetlink.send(HEADER.pack(size, kind, flags, 1, 0) + FAMILY + body)


def replies(ctnetlink: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Messages from the kernel; an error of a dump is raised, an acknowledgement is given."""
    while True:
        try:
            data = ctnetlink.recv(1 << 17)
        except TimeoutError as error:
            raise Unavailable(
                f"no reply from ctnetlink within {TIMEOUT_S:g} s: try again"
            ) from error
        except OSError as error:
            raise of_os_error(error, "cannot read conntrack entries") from error
        for kind, _flags, _sequence, body in messages(data):
            yield kind, body
