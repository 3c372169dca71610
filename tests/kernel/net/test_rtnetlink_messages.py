"""The messages that hostd spells itself are those that pyroute2 spells, byte for byte."""

# pyright: reportMissingTypeStubs=false
# (pyroute2 has no types)

from collections.abc import Mapping
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg

from handlers.host.net.netlink_messages import HEADER, NLA_NESTED
from handlers.host.net.rtnetlink_messages import (
    Request,
    link_change,
    new_address,
    new_bridge,
    new_fdb_entry,
    new_neighbour,
    no_link,
    no_neighbour,
    port_change,
)
from handlers.host.net.rtnetlink_reader import Address

MAC, IP = "02:fc:00:03:00:05", "10.240.3.5"
NONE: frozenset[int] = frozenset()


def info(kind: str, name: str, data: str, values: Mapping[str, int]) -> tuple[str, Any]:
    nested = {"attrs": list(values.items())}
    held = [(f"IFLA_INFO_{kind}", name), (f"IFLA_INFO_{data}", nested)]
    return "IFLA_LINKINFO", {"attrs": held}


BRIDGE = {"IFLA_BR_STP_STATE": 0, "IFLA_BR_FORWARD_DELAY": 0, "IFLA_BR_MCAST_SNOOPING": 0}
FLAGS = {"IFLA_BRPORT_ISOLATED": 1, "IFLA_BRPORT_LEARNING": 0, "IFLA_BRPORT_UNICAST_FLOOD": 0}
UP = {"flags": 1, "change": 1}
MESSAGES: dict[str, tuple[Request, Any, dict[str, int], list[tuple[str, Any]]]] = {
    "bridge": (
        new_bridge("br-tenant-3", MAC),
        ifinfmsg,
        {},
        [
            ("IFLA_IFNAME", "br-tenant-3"),
            ("IFLA_ADDRESS", MAC),
            info("KIND", "bridge", "DATA", BRIDGE),
        ],
    ),
    "alias and master": (
        link_change(7, ifalias="hostd:a/b/c", master=300),
        ifinfmsg,
        {"index": 7},
        [("IFLA_MASTER", 300), ("IFLA_IFALIAS", "hostd:a/b/c")],
    ),
    "address and alias, up": (
        link_change(7, state="up", address=MAC, ifalias="hostd:a"),
        ifinfmsg,
        {"index": 7, **UP},
        [("IFLA_ADDRESS", MAC), ("IFLA_IFALIAS", "hostd:a")],
    ),
    "down": (link_change(7, state="down"), ifinfmsg, {"index": 7, "change": 1}, []),
    "port": (
        port_change(7, isolated=1, learning=0, unicast_flood=0),
        ifinfmsg,
        {"index": 7},
        [info("SLAVE_KIND", "bridge", "SLAVE_DATA", FLAGS)],
    ),
    "address": (
        new_address(7, Address("10.240.3.1", 24)),
        ifaddrmsg,
        {"family": 2, "prefixlen": 24, "index": 7},
        [("IFA_LOCAL", "10.240.3.1"), ("IFA_ADDRESS", "10.240.3.1")],
    ),
    "neighbour": (
        new_neighbour(7, IP, MAC),
        ndmsg,
        {"family": 2, "ifindex": 7, "state": 0x80},
        [("NDA_DST", IP), ("NDA_LLADDR", MAC)],
    ),
    "FDB entry": (
        new_fdb_entry(7, MAC),
        ndmsg,
        {"family": 7, "ifindex": 7, "state": 0x40, "flags": 4},
        [("NDA_LLADDR", MAC)],
    ),
    "no neighbour": (
        no_neighbour(7, IP, NONE),
        ndmsg,
        {"family": 2, "ifindex": 7},
        [("NDA_DST", IP)],
    ),
    "no link": (no_link(7, NONE), ifinfmsg, {"index": 7}, []),
}


@pytest.mark.parametrize(("request_", "of", "facts", "held"), MESSAGES.values(), ids=MESSAGES)
def test_a_message_is_as_pyroute2_spells_it(
    request_: Request, of: Any, facts: dict[str, int], held: list[tuple[str, Any]]
) -> None:
    message = of()
    for name, value in facts.items():
        message[name] = value
    message["attrs"] = held
    message.encode()
    spelled = bytes(message.data)[HEADER.size :]

    assert unmarked(request_.body) == unmarked(spelled)


def unmarked(body: bytes) -> bytes:
    """Without the mark of nested attributes, which pyroute2 sets for some."""
    halves = [body[at : at + 2] for at in range(0, len(body), 2)]
    marked = {bits | NLA_NESTED: bits for bits in (2, 5, 18)}
    plain = {
        mark.to_bytes(2, "little"): bits.to_bytes(2, "little") for mark, bits in marked.items()
    }
    return b"".join(plain.get(half, half) for half in halves)
