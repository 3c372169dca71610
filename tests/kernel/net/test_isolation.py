"""The isolation proof: real frames from real TAPs, each flow with the rules and without them.

Without the rules every forbidden flow must be seen, or the test that it is not seen proves nothing.
That a frame did not pass is told by a later one, honest, on the same way, which did.
"""

import itertools
import select
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from schemas.settings import NetworkSettings
from tests.kernel.net.frames import (
    ARP,
    BROADCAST,
    EAPOL,
    IPV4,
    IPV6,
    QINQ,
    REPLY,
    REQUEST,
    VLAN,
    arp,
    echo_request,
    ethernet,
    ipv6,
    tcp_syn,
    udp,
)
from tests.kernel.net.frames import ipv4 as ipv4_packet
from tests.kernel.net.netns import (
    INTERNET,
    METADATA,
    UPLINK,
    HostNet,
    Sniffer,
    TapGuest,
    packet_socket,
    udp_socket,
)
from tests.kernel.net.plans import GuestPlan, net_of, plug_in, set_up

A1 = GuestPlan("acme", net_of(3), 5)
A2 = GuestPlan("acme", net_of(3), 6)
B1 = GuestPlan("umbra", net_of(300), 5)
HOST_PORT, SERVICE_PORT = 22, 53
tokens = (f"token-{number:06d}-".encode() for number in itertools.count())


@dataclass
class Stage:
    """Two tenants, three guests, an outside, and who listens where."""

    net: HostNet
    a1: TapGuest
    a2: TapGuest
    b1: TapGuest
    outside: Sniffer
    host: dict[int, socket.socket]
    eapol: Sniffer

    def settle(self) -> None:
        """Wait until all that A1 sent has gone its way: an honest frame comes last."""
        last = next(tokens)
        self.a1.send(to_gateway(udp(A1.ip, INTERNET, 4000, 4000, last)))
        assert self.outside.wait_for(last), "the honest frame did not come out"

    def host_got(self, token: bytes) -> bool:
        """Whether a service of the host was given the token."""
        got = False
        for listener in self.host.values():
            while select.select([listener], [], [], 0)[0]:
                got |= token in listener.recv(2048)
        return got


def to_gateway(packet: bytes, src: str = A1.mac) -> bytes:
    return ethernet(src, A1.gateway_mac, IPV4, packet)


def to_a2(protocol: int, payload: bytes, src: str = A1.mac, dst: str = A2.mac) -> bytes:
    return ethernet(src, dst, protocol, payload)


def tagged(inner: int, payload: bytes, vlan_id: int = 5) -> bytes:
    return vlan_id.to_bytes(2, "big") + inner.to_bytes(2, "big") + payload


Seen = Callable[[Stage, bytes], bool]


def outside(stage: Stage, token: bytes) -> bool:
    return stage.outside.saw(token)


def by_a2(stage: Stage, token: bytes) -> bool:
    return stage.a2.saw(token)


def by_b1(stage: Stage, token: bytes) -> bool:
    return stage.b1.saw(token)


def by_host(stage: Stage, token: bytes) -> bool:
    return stage.host_got(token)


def answered(stage: Stage, token: bytes) -> bool:
    """An echo reply comes back with the request's payload."""
    return stage.a1.saw(token)


def eapol(stage: Stage, token: bytes) -> bool:
    return stage.eapol.saw(token)


Flow = tuple[Callable[[bytes], bytes], Seen]

ALLOWED: dict[str, Flow] = {
    "UDP to the internet": (
        lambda t: to_gateway(udp(A1.ip, INTERNET, 5000, 5001, t)),
        outside,
    ),
    "UDP to a guest of the same tenant": (
        lambda t: to_a2(IPV4, udp(A1.ip, A2.ip, 5000, 5001, t)),
        by_a2,
    ),
    "echo to the own gateway": (
        lambda t: to_gateway(echo_request(A1.ip, A1.net.gateway_ip, t)),
        answered,
    ),
    "ARP about oneself": (
        lambda t: to_a2(ARP, arp(REPLY, A1.mac, A1.ip, A2.mac, A2.ip) + t),
        by_a2,
    ),
    "ARP request for a neighbour": (
        lambda t: to_a2(ARP, arp(REQUEST, A1.mac, A1.ip, A2.mac, A2.ip) + t, dst=BROADCAST),
        by_a2,
    ),
}

FORBIDDEN: dict[str, Flow] = {
    "UDP to another tenant": (
        lambda t: to_gateway(udp(A1.ip, B1.ip, 5000, 5001, t)),
        by_b1,
    ),
    "echo to another tenant's gateway": (
        lambda t: to_gateway(echo_request(A1.ip, B1.net.gateway_ip, t)),
        answered,
    ),
    "metadata address": (
        lambda t: to_gateway(udp(A1.ip, METADATA, 5000, 80, t)),
        outside,
    ),
    "host service on the gateway": (
        lambda t: to_gateway(udp(A1.ip, A1.net.gateway_ip, 5000, HOST_PORT, t)),
        by_host,
    ),
    "host service on the uplink's address": (
        lambda t: to_gateway(udp(A1.ip, UPLINK, 5000, HOST_PORT, t)),
        by_host,
    ),
    "echo to the uplink's address": (
        lambda t: to_gateway(echo_request(A1.ip, UPLINK, t)),
        answered,
    ),
    "broadcast to the host": (
        lambda t: ethernet(
            A1.mac, BROADCAST, IPV4, udp(A1.ip, "255.255.255.255", 68, HOST_PORT, t)
        ),
        by_host,
    ),
    "address of the neighbour": (
        lambda t: to_gateway(udp(A2.ip, INTERNET, 5000, 5001, t)),
        outside,
    ),
    "address of another tenant": (
        lambda t: to_gateway(udp(B1.ip, INTERNET, 5000, 5001, t)),
        outside,
    ),
    "address of the outside": (
        lambda t: to_gateway(udp("192.0.2.9", INTERNET, 5000, 5001, t)),
        outside,
    ),
    "no address, as DHCP does": (
        lambda t: ethernet(
            A1.mac, BROADCAST, IPV4, udp("0.0.0.0", "255.255.255.255", 68, HOST_PORT, t)
        ),
        by_a2,
    ),
    "MAC of the gateway": (
        lambda t: to_a2(IPV4, udp(A1.ip, A2.ip, 1, 2, t), src=A1.gateway_mac),
        by_a2,
    ),
    "MAC of the neighbour": (
        lambda t: to_gateway(udp(A1.ip, INTERNET, 5000, 5001, t), src=A2.mac),
        outside,
    ),
    "MAC of nobody": (
        lambda t: to_gateway(udp(A1.ip, INTERNET, 5000, 5001, t), src="02:99:99:99:99:99"),
        outside,
    ),
    "ARP that claims the gateway": (
        lambda t: to_a2(ARP, arp(REPLY, A1.mac, A1.net.gateway_ip, A2.mac, A2.ip) + t),
        by_a2,
    ),
    "ARP with another MAC inside": (
        lambda t: to_a2(ARP, arp(REPLY, "02:66:66:66:66:66", A1.ip, A2.mac, A2.ip) + t),
        by_a2,
    ),
    "ARP with another MAC outside": (
        lambda t: to_a2(ARP, arp(REPLY, A1.mac, A1.ip, A2.mac, A2.ip) + t, src="02:66:66:66:66:66"),
        by_a2,
    ),
    "reverse ARP": (
        lambda t: to_a2(ARP, arp(3, A1.mac, A1.ip, A2.mac, A2.ip) + t),
        by_a2,
    ),
    "IPv6": (
        lambda t: to_a2(IPV6, ipv6(t), dst="33:33:00:00:00:01"),
        by_a2,
    ),
    "IPv4 in a VLAN": (
        lambda t: to_a2(VLAN, tagged(IPV4, udp(A1.ip, A2.ip, 1, 2, t))),
        by_a2,
    ),
    "IPv4 with a priority tag": (
        lambda t: to_a2(VLAN, tagged(IPV4, udp(A1.ip, A2.ip, 1, 2, t), vlan_id=0x2000)),
        by_a2,
    ),
    "spoofed ARP in a VLAN": (
        lambda t: to_a2(
            VLAN, tagged(ARP, arp(REPLY, A1.mac, A1.net.gateway_ip, A2.mac, A2.ip) + t)
        ),
        by_a2,
    ),
    "two VLAN tags": (
        lambda t: to_a2(QINQ, tagged(VLAN, tagged(IPV4, udp(A1.ip, A2.ip, 1, 2, t)))),
        by_a2,
    ),
    "an odd protocol, broadcast": (
        lambda t: to_a2(0x88B5, t, dst=BROADCAST),
        by_a2,
    ),
    "spanning tree": (
        lambda t: to_a2(len(t) + 3, b"\x42\x42\x03" + t, dst="01:80:c2:00:00:00"),
        by_a2,
    ),
    "802.1X to the host": (
        lambda t: to_a2(EAPOL, t, dst="01:80:c2:00:00:03"),
        eapol,
    ),
    "a protocol with no ports to the host's own net": (
        lambda t: to_gateway(ipv4_packet(A1.ip, METADATA, 253, t)),
        outside,
    ),
}


@asynccontextmanager
async def play(settings: NetworkSettings | None = None) -> AsyncGenerator[Stage]:
    with HostNet(settings) as net:
        for plan in (A1, A2, B1):
            await set_up(net, plan.tenant_id, plan.net)
            await plug_in(net, plan)
        a1, a2, b1 = (TapGuest(net, plan.tap) for plan in (A1, A2, B1))
        raw = packet_socket(net.outside, "eth0")
        eapol_socket = packet_socket(net.host, A1.tap, EAPOL)
        host = {port: udp_socket(net.host, port) for port in (HOST_PORT, SERVICE_PORT)}
        try:
            yield Stage(
                net, a1, a2, b1, Sniffer(raw.fileno()), host, Sniffer(eapol_socket.fileno())
            )
        finally:
            for guest in (a1, a2, b1):
                guest.close()
            for opened in (raw, eapol_socket, *host.values()):
                opened.close()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with play() as made:
        yield made


def unprotected(net: HostNet) -> None:
    """The control: no worker, no rules, no settings that would hide that there are none."""
    net.reopen(NetworkSettings())
    net.host.nft("flush ruleset")
    for link in ("all", A1.net.bridge_name, B1.net.bridge_name):
        net.host.sysctl(f"ipv4/conf/{link}/rp_filter", "0")


def sent(stage: Stage, flows: dict[str, Flow]) -> dict[str, bool]:
    """Send each flow's frame from A1; tells of which the effect was seen."""
    seen: dict[str, bool] = {}
    for name, (frame, observed) in flows.items():
        token = next(tokens)
        stage.a1.send(frame(token))
        stage.settle()
        seen[name] = observed(stage, token)
    return seen


async def test_what_is_allowed_passes(stage: Stage) -> None:
    assert sent(stage, ALLOWED) == dict.fromkeys(ALLOWED, True)


async def test_what_is_forbidden_is_dropped(stage: Stage) -> None:
    assert sent(stage, FORBIDDEN) == dict.fromkeys(FORBIDDEN, False)


async def test_without_the_rules_each_forbidden_flow_passes(stage: Stage) -> None:
    unprotected(stage.net)

    assert sent(stage, FORBIDDEN) == dict.fromkeys(FORBIDDEN, True)


async def test_what_is_forbidden_is_counted_and_not_rejected(stage: Stage) -> None:
    before = len(stage.a1.frames)
    sent(stage, FORBIDDEN)

    tables = stage.net.host.command("nft", "list", "ruleset")
    counted = [
        line for line in tables.splitlines() if "packets" in line and "packets 0 " not in line
    ]
    assert any('"br-tenant-3" counter packets' in line for line in counted)
    assert len([line for line in counted if line.startswith("\t\tpackets")]) == 4
    stage.a1.saw(b"none")
    host = {socket.inet_aton(address) for address in (A1.net.gateway_ip, UPLINK)}
    assert [frame for frame in stage.a1.frames[before:] if frame[26:30] in host] == []


async def test_a_guest_goes_out_by_nat_and_gets_its_answer(stage: Stage) -> None:
    token, answer = next(tokens), next(tokens)
    with udp_socket(stage.net.outside, 7000, INTERNET) as server:
        stage.a1.send(to_gateway(udp(A1.ip, INTERNET, 6000, 7000, token)))

        data, address = server.recvfrom(2048)
        server.sendto(answer, address)

    assert data.startswith(token)
    assert address[0] == UPLINK
    assert stage.a1.wait_for(answer)


async def test_a_guest_opens_tcp_to_the_outside(stage: Stage) -> None:
    with stage.net.outside.run(lambda: socket.create_server((INTERNET, 7001))):
        stage.a1.send(to_gateway(tcp_syn(A1.ip, INTERNET, 6001, 7001)))

        ports = (7001).to_bytes(2, "big") + (6001).to_bytes(2, "big")
        syn_ack = stage.a1.wait_for(ports)

    assert syn_ack is not None
    assert syn_ack[14 + 20 + 13] == 0x12


async def test_the_host_reaches_a_guest_and_hears_its_answer(stage: Stage) -> None:
    token, answer = next(tokens), next(tokens)
    with udp_socket(stage.net.host, 6100) as client:
        client.sendto(token, (A1.ip, 6200))

        assert stage.a1.wait_for(token)
        stage.a1.send(to_gateway(udp(A1.ip, A1.net.gateway_ip, 6200, 6100, answer)))
        assert client.recv(2048).startswith(answer)


async def test_the_outside_does_not_reach_a_guest_by_itself(stage: Stage) -> None:
    def ask(token: bytes) -> bool:
        with udp_socket(stage.net.outside, 6300) as client:
            client.sendto(token, (A1.ip, 6400))
        stage.settle()
        return stage.a1.saw(token)

    assert not ask(next(tokens))
    unprotected(stage.net)
    assert ask(next(tokens))


async def test_a_flow_that_the_outside_opened_without_rules_ends_with_them(stage: Stage) -> None:
    net = stage.net
    unprotected(net)
    with udp_socket(net.outside, 6500) as client:
        first, answer, second = next(tokens), next(tokens), next(tokens)
        client.sendto(first, (A1.ip, 6600))
        assert stage.a1.wait_for(first)
        stage.a1.send(to_gateway(udp(A1.ip, "198.51.100.2", 6600, 6500, answer)))
        assert client.recv(2048).startswith(answer)

        for plan in (A1, A2, B1):
            await set_up(net, plan.tenant_id, plan.net)
            await net.mechanisms.pins.ensure(plan.pin)
        client.sendto(second, (A1.ip, 6600))
        stage.settle()

    assert not stage.a1.saw(second)


async def test_only_the_listed_host_services_are_open_and_only_on_the_own_gateway() -> None:
    async with play(NetworkSettings(host_services=(f"udp/{SERVICE_PORT}",))) as stage:
        flows: dict[str, Flow] = {
            "listed": (
                lambda t: to_gateway(udp(A1.ip, A1.net.gateway_ip, 5000, SERVICE_PORT, t)),
                by_host,
            ),
            "not listed": (
                lambda t: to_gateway(udp(A1.ip, A1.net.gateway_ip, 5000, HOST_PORT, t)),
                by_host,
            ),
            "listed, on the other tenant's gateway": (
                lambda t: to_gateway(udp(A1.ip, B1.net.gateway_ip, 5000, SERVICE_PORT, t)),
                by_host,
            ),
            "listed, on the uplink": (
                lambda t: to_gateway(udp(A1.ip, UPLINK, 5000, SERVICE_PORT, t)),
                by_host,
            ),
        }

        assert [name for name, seen in sent(stage, flows).items() if seen] == ["listed"]


async def test_isolated_guests_of_one_tenant_do_not_talk() -> None:
    async with play(NetworkSettings(isolate_guests=True)) as stage:
        seen = sent(stage, ALLOWED)

    assert {name for name, passed in seen.items() if passed} == {
        "UDP to the internet",
        "echo to the own gateway",
    }


async def test_echo_to_the_gateway_is_limited_per_tenant(stage: Stage) -> None:
    asked = 200
    for number in range(asked):
        payload = f"echo-{number:04d}".encode()
        stage.a1.send(to_gateway(echo_request(A1.ip, A1.net.gateway_ip, payload)))
    stage.settle()
    stage.a1.saw(b"none")

    answered_of_a = sum(b"echo-" in frame for frame in stage.a1.frames)
    assert 40 <= answered_of_a < asked / 2
    token = next(tokens)
    request = echo_request(B1.ip, B1.net.gateway_ip, token)
    stage.b1.send(ethernet(B1.mac, B1.gateway_mac, IPV4, request))
    assert stage.b1.wait_for(token), "another tenant's echo is not limited by this one's"


async def test_flows_of_a_tenant_are_limited_and_another_tenants_are_not() -> None:
    async with play(NetworkSettings(max_flows=10)) as stage:
        sent_tokens = [next(tokens) for _ in range(30)]
        for number, token in enumerate(sent_tokens):
            stage.a1.send(to_gateway(udp(A1.ip, INTERNET, 20_000 + number, 5001, token)))
        token = next(tokens)
        packet = udp(B1.ip, INTERNET, 5000, 5001, token)
        stage.b1.send(ethernet(B1.mac, B1.gateway_mac, IPV4, packet))

        assert stage.outside.wait_for(token), "another tenant is not held to this one's limit"
        assert [stage.outside.saw(token) for token in sent_tokens] == [True] * 10 + [False] * 20


async def test_the_gateway_answers_arp_for_its_own_address_alone(stage: Stage) -> None:
    for address in (UPLINK, B1.net.gateway_ip, A1.net.gateway_ip):
        request = arp(REQUEST, A1.mac, A1.ip, "00:00:00:00:00:00", address)
        stage.a1.send(ethernet(A1.mac, BROADCAST, ARP, request))
    stage.settle()
    stage.a1.saw(b"none")

    answers = [frame[28:32] for frame in stage.a1.frames if frame[12:14] == b"\x08\x06"]
    assert answers == [socket.inet_aton(A1.net.gateway_ip)]


async def test_the_operators_own_forwarding_is_not_touched(stage: Stage) -> None:
    """Two links of the operator's, routed through the host, are no tenant's."""
    net = stage.net
    net.host.ip("link add other0 type veth peer name other1")
    net.host.ip("addr add 192.0.2.1/24 dev other0")
    net.host.ip("link set other0 up")
    net.host.ip("link set other1 up")
    net.outside.ip(f"route add 192.0.2.0/24 via {UPLINK}")
    net.host.ip("neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev other0")
    with packet_socket(net.host, "other1") as inner, udp_socket(net.outside, 6700) as client:
        token, back = next(tokens), next(tokens)
        client.sendto(token, ("192.0.2.9", 6800))
        sniffer = Sniffer(inner.fileno())
        got = sniffer.wait_for(token)
        assert got is not None

        gateway = ":".join(f"{byte:02x}" for byte in got[6:12])
        packet = udp("192.0.2.9", "198.51.100.2", 6800, 6700, back)
        inner.send(ethernet("02:00:00:00:00:09", gateway, IPV4, packet))

        assert client.recv(2048).startswith(back)


async def test_what_a_guest_sends_and_receives_is_counted_from_its_side(stage: Stage) -> None:
    taps = stage.net.mechanisms.taps
    stage.settle()
    before = await taps.traffic(A1.tap)
    frames = [to_gateway(udp(A1.ip, INTERNET, 4000, 4000, next(tokens))) for _ in range(7)]
    spoofed = to_gateway(udp("10.9.9.9", INTERNET, 4000, 4000, next(tokens)))

    for frame in (*frames, spoofed):
        stage.a1.send(frame)

    after = await taps.traffic(A1.tap)
    assert before is not None
    assert after is not None
    assert after.sent_packets - before.sent_packets == 8
    assert after.sent_bytes - before.sent_bytes == sum(map(len, (*frames, spoofed)))
    token = next(tokens)
    stage.a1.send(to_gateway(echo_request(A1.ip, A1.net.gateway_ip, token)))
    assert stage.a1.wait_for(token)
    last = await taps.traffic(A1.tap)
    assert last is not None
    assert last.received_packets > after.received_packets
    assert last.received_bytes >= after.received_bytes + len(token)


async def test_a_tap_that_is_gone_or_not_hostds_has_no_counters(stage: Stage) -> None:
    taps = stage.net.mechanisms.taps
    stage.net.host.ip("tuntap add dev foreign0 mode tap")

    assert await taps.traffic("foreign0") is None
    assert await taps.traffic("tn3i99") is None
