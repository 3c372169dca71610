"""Teardown ends flows: nothing of a tenant's past reaches who has its addresses next."""

import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv4Network

import pytest

from handlers.host.net.conntrack import (
    CTA_FILTER,
    SIDES,
    ask_kernel,
    filtered_deletion,
    flush_conntrack,
    flush_listed,
    open_socket,
    read_entries,
    touches_subnet,
)
from handlers.host.net.netlink_messages import NLA_NESTED
from handlers.specs import TenantRulesSpec
from tests.kernel.net.frames import IPV4, echo_request, ethernet, tcp_syn, udp
from tests.kernel.net.netns import INTERNET, UPLINK, HostNet, TapGuest, udp_socket
from tests.kernel.net.plans import GuestPlan, net_of, plug_in, set_up

ACME, UMBRA = net_of(3), net_of(300)
FILTER_TYPE = CTA_FILTER | NLA_NESTED
A1, B1 = GuestPlan("acme", ACME, 5), GuestPlan("umbra", UMBRA, 5)


@pytest.fixture
async def net() -> AsyncIterator[HostNet]:
    with HostNet() as made:
        for plan in (A1, B1):
            await set_up(made, plan.tenant_id, plan.net)
            await plug_in(made, plan)
        yield made


def tracked(net: HostNet, subnet: str) -> int:
    """How many entries have an address of the subnet on any side."""

    def count() -> int:
        with open_socket() as ctnetlink:
            entries = read_entries(ctnetlink, IPv4Network(subnet))
            return sum(touches_subnet(entry, IPv4Network(subnet)) for entry in entries)

    return net.host.run(count)


def say(guest: TapGuest, plan: GuestPlan, packet: bytes) -> None:
    guest.send(ethernet(plan.mac, plan.gateway_mac, IPV4, packet))


async def take_down(net: HostNet, plan: GuestPlan) -> None:
    mechanisms = net.mechanisms
    await mechanisms.taps.remove(plan.tap)
    await mechanisms.pins.remove(plan.pin.key)
    await mechanisms.bridges.remove(plan.net.bridge_name)
    await mechanisms.tenant_rules.remove(TenantRulesSpec(plan.tenant_id, plan.net).key)


async def test_teardown_flushes_the_tenants_entries_of_all_protocols_and_no_other(
    net: HostNet,
) -> None:
    a1, b1 = TapGuest(net, A1.tap), TapGuest(net, B1.tap)
    listening = net.outside.run(lambda: socket.create_server((INTERNET, 7001)))
    with listening, udp_socket(net.outside, 7000, INTERNET) as server:
        say(a1, A1, echo_request(A1.ip, INTERNET, b"ping"))
        say(a1, A1, tcp_syn(A1.ip, INTERNET, 6001, 7001))
        say(b1, B1, udp(B1.ip, INTERNET, 6000, 7000, b"b"))
        say(a1, A1, udp(A1.ip, INTERNET, 6000, 7000, b"a"))
        for _ in range(2):
            server.recv(2048)
    with udp_socket(net.host, 6100) as client:
        client.sendto(b"from-the-host", (A1.ip, 6200))
    assert a1.wait_for(b"from-the-host")
    assert tracked(net, ACME.ipv4_subnet) == 4
    assert tracked(net, UMBRA.ipv4_subnet) == 1
    a1.close()

    await take_down(net, A1)

    assert tracked(net, ACME.ipv4_subnet) == 0
    assert tracked(net, UMBRA.ipv4_subnet) == 1
    b1.close()


async def test_the_flush_of_one_address_spares_its_neighbours(net: HostNet) -> None:
    """All four kinds of entries: the guest's own by NAT, and those of the host to the guest."""
    a2 = GuestPlan("acme", ACME, 50)
    await plug_in(net, a2)
    guests = [(TapGuest(net, plan.tap), plan) for plan in (A1, a2)]
    with udp_socket(net.outside, 7000, INTERNET) as server, udp_socket(net.host, 6100) as client:
        for guest, plan in guests:
            say(guest, plan, udp(plan.ip, INTERNET, 6000, 7000, b"a"))
            server.recv(2048)
            client.sendto(b"from-the-host", (plan.ip, 6200))
            assert guest.wait_for(b"from-the-host")
            guest.close()
    assert (tracked(net, f"{A1.ip}/32"), tracked(net, f"{a2.ip}/32")) == (2, 2)

    await net.mechanisms.networks.flush_conntrack(A1.ip)

    assert (tracked(net, f"{A1.ip}/32"), tracked(net, f"{a2.ip}/32")) == (0, 2)


async def test_an_address_is_flushed_again_once_it_has_had_a_tap(net: HostNet) -> None:
    """Until then nothing is looked for: the flows of its guest ended with the first flush."""
    with udp_socket(net.host, 6100) as client:
        await take_down(net, A1)
        await net.mechanisms.networks.flush_conntrack(A1.ip)
        await set_up(net, "acme", ACME)
        client.sendto(b"nobody-is-there", (A1.ip, 6200))
        await net.mechanisms.networks.flush_conntrack(A1.ip)
        assert tracked(net, f"{A1.ip}/32") == 1

        await plug_in(net, A1)
        await net.mechanisms.networks.flush_conntrack(A1.ip)

    assert tracked(net, f"{A1.ip}/32") == 0


@pytest.mark.parametrize("flushed", [True, False])
async def test_an_established_flow_does_not_reach_who_has_the_address_next(
    net: HostNet, *, flushed: bool
) -> None:
    """Without the flush it does: the control that makes this a proof."""
    a1 = TapGuest(net, A1.tap)
    with udp_socket(net.outside, 7000, INTERNET) as server:
        say(a1, A1, udp(A1.ip, INTERNET, 6000, 7000, b"question"))
        _, address = server.recvfrom(2048)
        server.sendto(b"answer-1", address)
        assert address[0] == UPLINK
        assert a1.wait_for(b"answer-1")
        a1.close()

        if flushed:
            await take_down(net, A1)
        else:
            await net.mechanisms.taps.remove(A1.tap)
        await set_up(net, "acme", ACME)
        await plug_in(net, A1)
        successor = TapGuest(net, A1.tap)
        server.sendto(b"answer-2", address)
        say(successor, A1, udp(A1.ip, INTERNET, 6001, 7000, b"question-2"))
        _, fresh = server.recvfrom(2048)
        server.sendto(b"answer-3", fresh)

        assert successor.wait_for(b"answer-3")
        assert successor.saw(b"answer-2") is not flushed
    successor.close()


Flush = Callable[[socket.socket, IPv4Network], None]
FLUSHES: dict[str, tuple[Flush, str]] = {
    "subnet": (flush_conntrack, ACME.ipv4_subnet),
    "address": (flush_conntrack, f"{A1.ip}/32"),
    "address on an older kernel": (flush_listed, f"{A1.ip}/32"),
}


@pytest.mark.parametrize(("flush", "of"), FLUSHES.values(), ids=FLUSHES)
async def test_many_entries_go_and_an_empty_table_is_no_error(
    net: HostNet, flush: Flush, of: str
) -> None:
    a1 = TapGuest(net, A1.tap)
    with udp_socket(net.outside, 7000, INTERNET) as server:
        for port in range(10_000, 10_500):
            say(a1, A1, udp(A1.ip, INTERNET, port, 7001, b"x"))
        say(a1, A1, udp(A1.ip, INTERNET, 6000, 7000, b"last"))
        server.recv(2048)
    a1.close()
    assert tracked(net, of) == 501

    with net.host.run(open_socket) as ctnetlink:
        flush(ctnetlink, IPv4Network(of))
        flush(ctnetlink, IPv4Network(of))

    assert tracked(net, of) == 0


async def test_an_incomplete_tuple_without_the_filter_deletes_nothing(net: HostNet) -> None:
    """What a kernel that does not know the filter of a deletion makes of the request: it refuses
    it, and does not take it to mean all entries."""
    a1 = TapGuest(net, A1.tap)
    with udp_socket(net.outside, 7000, INTERNET) as server:
        say(a1, A1, udp(A1.ip, INTERNET, 6000, 7000, b"a"))
        server.recv(2048)
    a1.close()

    def unfiltered() -> list[int]:
        requests = [filtered_deletion(IPv4Address(A1.ip), *side) for side in SIDES]
        cut = [
            request[: request.rindex(struct.pack("=H", FILTER_TYPE)) - 2] for request in requests
        ]
        with open_socket() as ctnetlink:
            return ask_kernel(ctnetlink, *cut)

    assert net.host.run(unfiltered) == [errno.EINVAL] * len(SIDES)
    assert tracked(net, f"{A1.ip}/32") == 1
