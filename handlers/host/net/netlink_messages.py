"""Netlink's own framing: messages and their attributes, as bytes. No I/O."""

import struct
from collections.abc import Container, Iterator

# linux/netlink.h; the header: length, type, flags, sequence number, port id
HEADER = struct.Struct("=IHHII")
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLA_NESTED, NLA_TYPE = 0x8000, 0x3FFF

ALL = range(NLA_TYPE + 1)

Attributes = dict[int, bytes]
ATTRIBUTE = struct.Struct("=HH")  # the header of an attribute: length, type


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and body of each message of a datagram."""
    at = 0
    while at + HEADER.size <= len(data):
        size, kind, flags, sequence, _port = HEADER.unpack_from(data, at)
        yield kind, flags, sequence, data[at + HEADER.size : at + size]
        at += max(HEADER.size, (size + 3) & ~3)


def pieces(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sender's port ID and body of each message of a datagram."""
    at = 0
    while at + HEADER.size <= len(data):
        size, kind, _flags, _sequence, port = HEADER.unpack_from(data, at)
        yield kind, port, data[at + HEADER.size : at + size]
        at += max(HEADER.size, (size + 3) & ~3)


def attributes(data: bytes, wanted: Container[int] = ALL) -> Attributes:
    """Attributes by type, in the order of the message, or the wanted ones; a cut one ends it."""
    found: Attributes = {}
    at, last = 0, len(data) - 4
    while at <= last:
        size, kind = ATTRIBUTE.unpack_from(data, at)
        if size < 4:
            break
        kind &= NLA_TYPE
        if kind in wanted:
            found[kind] = data[at + 4 : at + size]
        at += (size + 3) & ~3
    return found


def first_attribute(data: bytes, kind: int) -> bytes:
    """The value of the first attribute of a kind; empty if there is none. Reads no further."""
    at, last = 0, len(data) - 4
    while at <= last:
        size, found = ATTRIBUTE.unpack_from(data, at)
        if size < 4:
            break
        if found & NLA_TYPE == kind:
            return data[at + 4 : at + size]
        at += (size + 3) & ~3
    return b""


def attribute(kind: int, value: bytes, *, nested: bool = False) -> bytes:
    """One attribute with its header and padding."""
    size = 4 + len(value)
    flags = NLA_NESTED if nested else 0
    return ATTRIBUTE.pack(size, kind | flags) + value + bytes(-size % 4)
