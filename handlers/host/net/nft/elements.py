"""Elements of hostd's sets as nf_tables' own messages: the one change that each launch makes.

Built and read here because the way by nft's language takes 1.2 ms of a launch: text is built,
parsed, checked and sent. Only plain sets of links and addresses: those of intervals, those that
packets fill and that of services are left to nft's language, and so is all that happens rarely. No
I/O; changes nothing.

Source: linux/netfilter/nfnetlink.h, nf_tables.h; nf_tables_api.c. A concatenation is its parts one
after the other, each padded to 4 bytes.
"""

import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from handlers.host.net.chains import GUARD, SETS, TABLE
from handlers.host.net.netlink_messages import (
    HEADER,
    NLA_NESTED,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    attribute,
    attributes,
    messages,
)

Element = tuple[str, ...]
# A set's family, table and name, and one element of it.
Member = tuple[str, Element]

NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_BATCH_GENID = 0x10, 0x11, 1
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_NEWSETELEM, NFT_MSG_GETSETELEM, NFT_MSG_DELSETELEM = (10 << 8) | 12, (10 << 8) | 13, 2574
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE = 1, 1, 1
NLM_F_CREATE = 0x400
ERESTART = 85
FAMILIES = {"inet": 1, "bridge": 7}
LARGEST = 256
"""More members than this in one change go by nft's language: a message has a largest size."""

GENERIC = struct.Struct("=BBH")
ELEMENT = struct.Struct("=HHHHHH")  # the headers of an element, its key and the key's value
BATCH = GENERIC.pack(0, 0, socket.htons(NFNL_SUBSYS_NFTABLES))

PARTS: Final[dict[str, Callable[[str], bytes]]] = {
    "ifname": lambda name: name.encode().ljust(16, b"\0"),
    "ether_addr": lambda mac: bytes.fromhex(mac.replace(":", "")) + bytes(2),
    "ipv4_addr": socket.inet_aton,
}
TYPES: Final[dict[str, tuple[Callable[[str], bytes], ...]]] = {
    f"{family} {table} {name}": tuple(
        PARTS[part] for part in spec.split(";")[0].removeprefix("type ").split(" . ")
    )
    for family, sets in SETS.items()
    for name, spec in sets.items()
    for table in (TABLE, GUARD)
    if "flags" not in spec and name != "services"
}


def _head(name: str) -> bytes:
    """What a message about elements of a set begins with."""
    family, table, of = name.split(" ")
    return (
        GENERIC.pack(FAMILIES[family], 0, 0)
        + attribute(NFTA_SET_ELEM_LIST_TABLE, table.encode() + b"\0")
        + attribute(NFTA_SET_ELEM_LIST_SET, of.encode() + b"\0")
    )


HEADS: Final = {name: _head(name) for name in TYPES}


def plain(members: Sequence[Member]) -> bool:
    """Whether all of them can be written here: few enough, and of plain sets."""
    return len(members) <= LARGEST and all(name in TYPES for name, _ in members)


def change_batch(remove: Iterable[Member], add: Iterable[Member], generation: int) -> bytes:
    """One transaction, refused (ERESTART) unless the ruleset is of this generation.

    To delete one that is absent would fail it: so each is added first.
    """
    sent = [message(NFNL_MSG_BATCH_BEGIN, 0, 0, BATCH + number(NFNL_BATCH_GENID, generation))]
    gone = by_set(remove)
    orders = [(NFT_MSG_NEWSETELEM, name, keys) for name, keys in gone.items()]
    orders += [(NFT_MSG_DELSETELEM, name, keys) for name, keys in gone.items()]
    orders += [(NFT_MSG_NEWSETELEM, name, keys) for name, keys in by_set(add).items()]
    for place, (kind, name, keys) in enumerate(orders, 1):
        flags = NLM_F_CREATE if kind == NFT_MSG_NEWSETELEM else 0
        flags |= NLM_F_ACK if place == len(orders) else 0
        sent.append(message(kind, flags, place, of_set(name, keys)))
    return b"".join(sent) + message(NFNL_MSG_BATCH_END, 0, len(orders) + 1, BATCH)


def change_result(answers: Iterable[bytes]) -> int | None:
    """The first error of a batch, 0 if it is in force, None if the kernel said neither."""
    codes = [code for data in answers for code, _ in errors_of(data)]
    return next((code for code in codes if code), 0 if codes else None)


def question(members: Iterable[Member]) -> tuple[bytes, set[tuple[int, bytes]]]:
    """Requests for these elements, and the answers if all are there: request and key of each."""
    sent: list[bytes] = []
    wanted: set[tuple[int, bytes]] = set()
    for place, (name, keys) in enumerate(by_set(members).items(), 1):
        sent.append(message(NFT_MSG_GETSETELEM, 0, place, of_set(name, keys)))
        wanted |= {(place, key) for key in keys}
    return b"".join(sent), wanted


def answered(answers: Iterable[bytes]) -> tuple[set[tuple[int, bytes]], set[int]]:
    """The elements that the kernel has, and its errors."""
    found: set[tuple[int, bytes]] = set()
    codes: set[int] = set()
    for data in answers:
        codes |= {code for code, _ in errors_of(data) if code}
        for kind, _flags, sequence, body in messages(data):
            if kind == NFT_MSG_NEWSETELEM:
                held = attributes(body[GENERIC.size :])
                for element in each_in(held.get(NFTA_SET_ELEM_LIST_ELEMENTS, b"")):
                    key = attributes(attributes(element).get(NFTA_SET_ELEM_KEY, b""))
                    found.add((sequence, key.get(NFTA_DATA_VALUE, b"")))
    return found, codes


def key_of(name: str, element: Element) -> bytes:
    """The element's key in the kernel's spelling."""
    types = TYPES[name]
    return b"".join([spell(part) for spell, part in zip(types, element, strict=True)])


def by_set(members: Iterable[Member]) -> dict[str, list[bytes]]:
    """Keys by set, in the order of the members."""
    keys: dict[str, list[bytes]] = {}
    for name, element in members:
        keys.setdefault(name, []).append(key_of(name, element))
    return keys


def of_set(name: str, keys: Iterable[bytes]) -> bytes:
    """The body of a message about elements of one set."""
    elements = b"".join([of_element(key) for key in keys])
    return HEADS[name] + attribute(NFTA_SET_ELEM_LIST_ELEMENTS, elements, nested=True)


def of_element(key: bytes) -> bytes:
    """The element with this key, in a list; the length of a key is a multiple of 4."""
    size = len(key)
    return (
        ELEMENT.pack(
            *(size + 12, NFTA_LIST_ELEM | NLA_NESTED),
            *(size + 8, NFTA_SET_ELEM_KEY | NLA_NESTED),
            *(size + 4, NFTA_DATA_VALUE),
        )
        + key
    )


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body


def number(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(4, "big"))


def each_in(nest: bytes) -> Iterable[bytes]:
    """The values of a list, whose attributes are all of one type."""
    while len(nest) >= 4:
        size = int.from_bytes(nest[:2], "little")
        if size < 4:
            return
        yield nest[4:size]
        nest = nest[(size + 3) & ~3 :]


def errors_of(data: bytes) -> Iterable[tuple[int, int]]:
    """Error number, 0 for an acknowledgement, and sequence number of each answer of that kind."""
    for kind, _flags, sequence, body in messages(data):
        if kind == NLMSG_ERROR:
            yield -int.from_bytes(body[:4], "little", signed=True), sequence
