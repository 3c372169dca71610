"""Filters that the kernel runs on what it would queue for a netlink listener: classic BPF.

What hostd itself causes, and what is about other programs' interfaces, wakes no thread and is not
decoded. A filter sees the first message of a datagram; one datagram has messages of one sender.

Source: Documentation/networking/filter.rst, linux/filter.h. Needs: nothing.
"""

import ctypes
import socket
import struct

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant
SO_ATTACH_FILTER = 26
LOAD_WORD, LOAD_HALF, LOAD_BYTE = 0x20, 0x28, 0x30  # BPF_LD | BPF_ABS
LOAD_HALF_X, LOAD_WORD_X = 0x48, 0x40  # BPF_LD | BPF_IND
LOAD_NUMBER, LOAD_X_NUMBER, TO_X = 0x00, 0x01, 0x07
IF_EQUAL, RETURN = 0x15, 0x06
FIND_ATTRIBUTE = 0xFFFFF000 + 12  # SKF_AD_OFF + SKF_AD_NLATTR
DROP, KEEP = (RETURN, 0, 0, 0), (RETURN, 0, 0, 0xFFFFFFFF)
NLMSG_TYPE, NLMSG_PORT, FAMILY, LINK_ATTRIBUTES = 4, 12, 16, 32
IFLA_IFNAME, AF_BRIDGE, NLA_HEADER = 3, 7, 4


def attach(listener: socket.socket, program: list[Instruction]) -> None:
    """Put a filter in front of a listener."""
    code = b"".join(struct.pack("=HBBI", *each) for each in program)
    held = ctypes.create_string_buffer(code, len(code))
    argument = struct.pack("@HP", len(program), ctypes.addressof(held))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, argument)


def drop_all_of_port_but(port: int, kind: int) -> list[Instruction]:
    """Of the sender with this port ID, only messages of one kind."""
    return [
        (LOAD_WORD, 0, 0, NLMSG_PORT),
        (IF_EQUAL, 1, 0, swapped(port, 4)),
        KEEP,
        (LOAD_HALF, 0, 0, NLMSG_TYPE),
        (IF_EQUAL, 1, 0, swapped(kind, 2)),
        DROP,
        KEEP,
    ]


def drop_port(port: int) -> list[Instruction]:
    """Nothing of the sender with this port ID."""
    return [
        (LOAD_WORD, 0, 0, NLMSG_PORT),
        (IF_EQUAL, 0, 1, swapped(port, 4)),
        DROP,
        KEEP,
    ]


def links_named(
    begin2: bytes, begin4: bytes, link_kinds: tuple[int, int], others: list[Instruction]
) -> list[Instruction]:
    """Of messages about links those of links whose names begin so, in two bytes or in four, without
    those about the bridge's view of its ports; of all other messages what `others` keeps."""
    return [
        (LOAD_HALF, 0, 0, NLMSG_TYPE),
        (IF_EQUAL, 1, 0, swapped(link_kinds[0], 2)),
        (IF_EQUAL, 0, 15, swapped(link_kinds[1], 2)),
        (LOAD_BYTE, 0, 0, FAMILY),
        (IF_EQUAL, 0, 1, AF_BRIDGE),
        DROP,
        (LOAD_NUMBER, 0, 0, LINK_ATTRIBUTES),
        (LOAD_X_NUMBER, 0, 0, IFLA_IFNAME),
        (LOAD_WORD, 0, 0, FIND_ATTRIBUTE),
        (IF_EQUAL, 0, 1, 0),
        KEEP,
        (TO_X, 0, 0, 0),
        (LOAD_HALF_X, 0, 0, NLA_HEADER),
        (IF_EQUAL, 3, 0, int.from_bytes(begin2, "big")),
        (LOAD_WORD_X, 0, 0, NLA_HEADER),
        (IF_EQUAL, 1, 0, int.from_bytes(begin4, "big")),
        DROP,
        KEEP,
        *others,
    ]


def swapped(value: int, size: int) -> int:
    """A number of a message as a filter loads it: in network order."""
    return int.from_bytes(value.to_bytes(size, "little"), "big")
