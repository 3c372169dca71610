"""What others do to hostd's tables opens no gap: nothing passes that must not."""

import itertools
import select
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from handlers.errors import HostFault
from handlers.host.net.chains import CHAINS, GUARD, SETS
from handlers.specs import TenantRulesSpec
from schemas.settings import NetworkSettings
from tests.kernel.net.frames import ARP, IPV4, REPLY, arp, udp
from tests.kernel.net.netns import INTERNET, METADATA, UPLINK, Sniffer, udp_socket
from tests.kernel.net.plans import plug_in, set_up
from tests.kernel.net.test_isolation import (
    A1,
    A2,
    ALLOWED,
    B1,
    FORBIDDEN,
    Stage,
    play,
    sent,
    to_a2,
    to_gateway,
    tokens,
)

FLUSHES = 100
MUST_NOT_PASS = b"must-not-pass"
CUTTING = {"uplinks", "pins"}
"""Without the elements of these sets guests are cut off entirely, until the repair."""
FOREIGN_CHANGES = {
    "flush ruleset": "flush ruleset",
    "delete both tables": "delete table inet hostd\ndelete table bridge hostd",
    **{f"delete table {family} hostd": f"delete table {family} hostd" for family in CHAINS},
    **{
        f"flush chain {family} {name}": f"flush chain {family} hostd {name}"
        for family, chains in CHAINS.items()
        for name in chains
    },
    **{
        f"flush set {family} {name}": f"flush set {family} hostd {name}"
        for family, sets in SETS.items()
        for name in sets
        if name not in CUTTING
    },
    "accept first": (
        "insert rule inet hostd from_tenant accept\n"
        "insert rule inet hostd to_tenant accept\n"
        "insert rule inet hostd from_guest accept\n"
        "insert rule bridge hostd from_guest accept"
    ),
}


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with play() as made:
        yield made


@pytest.mark.parametrize("change", FOREIGN_CHANGES.values(), ids=FOREIGN_CHANGES)
async def test_nothing_forbidden_passes_after_a_foreign_change(stage: Stage, change: str) -> None:
    stage.net.host.nft(change)

    assert sent(stage, FORBIDDEN) == dict.fromkeys(FORBIDDEN, False)


@pytest.mark.parametrize("change", ["flush ruleset", *(f"delete table {f} hostd" for f in CHAINS)])
async def test_what_is_allowed_goes_on_after_a_foreign_flush(stage: Stage, change: str) -> None:
    stage.net.host.nft(change)

    assert sent(stage, ALLOWED) == dict.fromkeys(ALLOWED, True)
    with udp_socket(stage.net.outside, 7000, INTERNET) as server:
        stage.a1.send(to_gateway(udp(A1.ip, INTERNET, 6000, 7000, next(tokens))))
        assert server.recvfrom(2048)[1][0] == UPLINK


async def test_the_outside_does_not_reach_a_guest_after_a_foreign_flush(stage: Stage) -> None:
    stage.net.host.nft("flush ruleset")
    token = next(tokens)
    with udp_socket(stage.net.outside, 6300) as client:
        client.sendto(token, (A1.ip, 6400))
    stage.settle()

    assert not stage.a1.saw(token)


Frame = Callable[[bytes], bytes]
SENT_DURING_FLUSHES: dict[str, tuple[Frame, Callable[[Stage], Sniffer]]] = {
    "another tenant": (
        lambda t: to_gateway(udp(A1.ip, B1.ip, 5000, 5001, t)),
        lambda stage: stage.b1,
    ),
    "metadata": (
        lambda t: to_gateway(udp(A1.ip, METADATA, 5000, 80, t)),
        lambda stage: stage.outside,
    ),
    "address of the outside": (
        lambda t: to_gateway(udp("192.0.2.9", INTERNET, 5000, 5001, t)),
        lambda stage: stage.outside,
    ),
    "MAC of the gateway": (
        lambda t: to_a2(IPV4, udp(A1.ip, A2.ip, 1, 2, t), src=A1.gateway_mac),
        lambda stage: stage.a2,
    ),
    "ARP that claims the gateway": (
        lambda t: to_a2(ARP, arp(REPLY, A1.mac, A1.net.gateway_ip, A2.mac, A2.ip) + t),
        lambda stage: stage.a2,
    ),
}


async def test_no_packet_passes_during_a_hundred_foreign_flushes(stage: Stage) -> None:
    """Each kind of packet is sent every millisecond while the tables are flushed and repaired."""
    net = stage.net
    net.host.sysctl("ipv4/conf/all/rp_filter", "0")
    net.host.sysctl(f"ipv4/conf/{A1.net.bridge_name}/rp_filter", "0")
    done = threading.Event()
    sent_count = 0

    def send() -> None:
        nonlocal sent_count
        while not done.wait(0.001):
            for frame, _ in SENT_DURING_FLUSHES.values():
                stage.a1.send(frame(MUST_NOT_PASS))
            stage.a1.send(to_gateway(udp(A1.ip, A1.net.gateway_ip, 5000, 7777, MUST_NOT_PASS)))
            sent_count += 1

    seen: list[str] = []
    changes = itertools.cycle(
        change for change in FOREIGN_CHANGES.values() if not change.startswith("flush set")
    )
    sender = threading.Thread(target=send)
    with udp_socket(net.host, 7777) as listener:
        sender.start()
        try:
            for change in itertools.islice(changes, FLUSHES):
                net.host.nft(change)
                for plan in (A1, B1):
                    await set_up(net, plan.tenant_id, plan.net)
                for plan in (A1, A2, B1):
                    await plug_in(net, plan)
                for name, (_, sniffer) in SENT_DURING_FLUSHES.items():
                    if sniffer(stage).saw(MUST_NOT_PASS):
                        seen.append(f"{name} after {change}")
        finally:
            done.set()
            sender.join()
        stage.settle()
        if select.select([listener], [], [], 0)[0]:
            seen.append("host service")

    assert seen == []
    assert sent_count >= FLUSHES


async def test_the_guard_cannot_be_changed_by_another_program(stage: Stage) -> None:
    for change in (f"delete table inet {GUARD}", f"flush chain bridge {GUARD} from_guest"):
        with pytest.raises(AssertionError, match="Operation not permitted"):
            stage.net.host.nft(change)


async def test_a_second_worker_in_the_namespace_is_refused(stage: Stage) -> None:
    second = stage.net.open(NetworkSettings())
    try:
        with pytest.raises(HostFault, match="only one worker"):
            await second.networks.prepare()
    finally:
        second.close()


async def test_a_new_worker_guards_the_tenants_that_it_finds(stage: Stage) -> None:
    """Before any of them is restored, and with what the tables hold."""
    stage.net.reopen(NetworkSettings())
    await stage.net.mechanisms.networks.prepare()
    stage.net.host.nft("flush ruleset")

    assert sent(stage, FORBIDDEN) == dict.fromkeys(FORBIDDEN, False)
    assert sent(stage, ALLOWED) == dict.fromkeys(ALLOWED, True)


async def test_a_tenant_removed_after_a_flush_leaves_the_guard_too(stage: Stage) -> None:
    net = stage.net
    net.host.nft("flush ruleset")
    await net.mechanisms.bridges.remove(B1.net.bridge_name)
    await net.mechanisms.tenant_rules.remove(TenantRulesSpec("umbra", B1.net).key)

    assert B1.net.bridge_name not in net.host.ruleset()
    assert B1.tap not in net.host.ruleset()
