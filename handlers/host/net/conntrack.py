"""Connection tracking entries of an address or a subnet: deleted over ctnetlink, nothing else.

Those of one address are deleted by the kernel's own filter. Those of a subnet, and those of an
address where the kernel is older, are read and deleted one by one, on the socket itself: the tables
of a busy host hold some 100,000 entries, of which only the addresses matter here, and a tuple is
best deleted by the bytes the kernel gave for it.
"""

import errno
import itertools
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
from handlers.host.net.rtnetlink_reader import error_of

# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
NETLINK_NETFILTER = 12
CT_GET, CT_DELETE, CT_GET_STATS = (1 << 8) | 1, (1 << 8) | 2, (1 << 8) | 5
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID, CTA_ZONE, CTA_FILTER = 1, 2, 12, 18, 25
CTA_TUPLE_IP, CTA_IP_V4_SRC, CTA_IP_V4_DST = 1, 1, 2
CTA_STATS_GLOBAL_ENTRIES = 1
# linux/netfilter/nf_internals.h: CTA_FILTER_FLAG of the two addresses of a tuple
FILTER_FLAG = {CTA_IP_V4_SRC: 1 << 0, CTA_IP_V4_DST: 1 << 1}
SIDES = tuple(itertools.product((CTA_TUPLE_ORIG, CTA_TUPLE_REPLY), FILTER_FLAG))
FAMILY = struct.pack("=BBH", socket.AF_INET, 0, 0)
TIMEOUT_S = 10.0


def flush_conntrack(ctnetlink: socket.socket, subnet: IPv4Network) -> None:
    """Delete all entries with an address of the subnet on any side.

    Source: nfnetlink(7), nf_conntrack_netlink.c. Needs: CAP_NET_ADMIN. Blocks: of one address the
    kernel looks at the hash buckets that are not empty, of none if the namespace has no entry. To
    list the entries (of a subnet; of an address before Linux 6.11) it locks each bucket: 10 ms.
    """
    if subnet.prefixlen == subnet.max_prefixlen:
        if not flush_address(ctnetlink, subnet.network_address):
            flush_listed(ctnetlink, subnet)
    elif count_entries(ctnetlink):
        flush_listed(ctnetlink, subnet)


def flush_address(ctnetlink: socket.socket, address: IPv4Address) -> bool:
    """Delete the entries with the address on any side; false if this kernel cannot filter.

    Each request has a tuple, so no kernel takes it to mean all entries: one that does not know the
    filter of a deletion finds the tuple incomplete and refuses it.
    """
    codes = ask_kernel(ctnetlink, *(filtered_deletion(address, *side) for side in SIDES))
    refused = {code for code in codes if code}
    if refused <= {errno.EINVAL, errno.EOPNOTSUPP}:
        return not refused
    raise of_os_error(OSError(max(refused), ""), f"cannot delete conntrack entries of {address}")


def filtered_deletion(address: IPv4Address, side: int, which: int) -> bytes:
    """The request to delete the entries with this address in one field of one tuple."""
    held = attribute(which, address.packed)
    tuple_ = attribute(side, attribute(CTA_TUPLE_IP, held, nested=True), nested=True)
    flags = attribute(side, struct.pack("=I", FILTER_FLAG[which]))
    other = CTA_TUPLE_ORIG + CTA_TUPLE_REPLY - side
    flags += attribute(other, struct.pack("=I", 0))
    return tuple_ + attribute(CTA_FILTER, flags, nested=True)


def ask_kernel(ctnetlink: socket.socket, *deletions: bytes) -> list[int]:
    """Send the deletions at once; the error numbers that the kernel gave, 0 for success."""
    sent = b""
    for number, body in enumerate(deletions, 1):
        size = HEADER.size + len(FAMILY) + len(body)
        sent += HEADER.pack(size, CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, number, 0) + FAMILY + body
    ctnetlink.send(sent)
    answers = replies(ctnetlink)
    return [error_of(next(answers)[1]) for _ in deletions]


def count_entries(ctnetlink: socket.socket) -> int:
    """How many entries the namespace has."""
    send_request(ctnetlink, CT_GET_STATS, NLM_F_REQUEST, b"")
    for _kind, body in replies(ctnetlink):
        found = attributes(body[len(FAMILY) :]).get(CTA_STATS_GLOBAL_ENTRIES, b"")
        return int.from_bytes(found, "big")
    return 0


def flush_listed(ctnetlink: socket.socket, subnet: IPv4Network) -> None:
    """List the entries and delete those that touch the subnet."""
    doomed = [entry for entry in read_entries(ctnetlink, subnet) if touches_subnet(entry, subnet)]
    for entry in doomed:
        delete_entry(ctnetlink, entry)


def open_socket() -> socket.socket:
    """To be kept: closing one waits until nf_tables has freed what was removed, up to 10 ms."""
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
        code = error_of(body)
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
