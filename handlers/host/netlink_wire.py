"""Netlink's own framing: a message's header and its attributes, as bytes. No I/O."""

import struct

# linux/netlink.h: length, type, flags, sequence number, port id
HEADER = struct.Struct("=IHHII")
NLA_NESTED, NLA_TYPE = 0x8000, 0x3FFF

Attributes = dict[int, bytes]


def attributes(data: bytes) -> Attributes:
    """Attributes by type, in the order of the message; a cut one ends it."""
    found: Attributes = {}
    at = 0
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        if size < 4:
            break
        found[kind & NLA_TYPE] = data[at + 4 : at + size]
        at += (size + 3) & ~3
    return found


def attribute(kind: int, value: bytes, *, nested: bool = False) -> bytes:
    """One attribute with its header and padding."""
    size = 4 + len(value)
    flags = NLA_NESTED if nested else 0
    return struct.pack("=HH", size, kind | flags) + value + bytes(-size % 4)
