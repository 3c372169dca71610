"""hostd's tables as a whole: the same by any way, as long for many tenants as for one."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from handlers.errors import HostFault
from handlers.host.net.antispoof import Pins
from handlers.host.net.chains import CARRIED
from handlers.host.net.nft.elements import NFNL_MSG_BATCH_BEGIN
from handlers.host.net.nft.libnftables import Engine, Library, Program, open_engine
from handlers.host.net.nft.nftables import Nft
from handlers.host.net.ruleset import BaseRules
from handlers.specs import BridgeSpec, TenantRulesSpec
from schemas.settings import NetworkSettings
from tests.kernel.net.netns import OUTSIDE, HostNet
from tests.kernel.net.plans import GuestPlan, net_of, plug_in, set_up

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ACME, UMBRA = net_of(3), net_of(300)
GUEST = GuestPlan("acme", ACME, 5)


@pytest.fixture
async def net() -> AsyncIterator[HostNet]:
    with HostNet() as made:
        yield made


@pytest.fixture
def opened(net: HostNet) -> Iterator[Callable[[Callable[[], Engine]], Nft]]:
    """Opens nftables threads with engines of the test's choice."""
    with ExitStack() as made:

        def open_with(engine: Callable[[], Engine]) -> Nft:
            nft = Nft(net.host.enter, engine)
            made.callback(nft.close)
            return nft

        yield open_with


def rules_only(ruleset: str) -> list[str]:
    """The ruleset without the elements of its sets."""
    return re.sub(r"\t\telements = {[^}]*}\n", "", ruleset).splitlines()


async def fill(net: HostNet, tenants: range) -> None:
    """Tenants and a guest of each, by the mechanisms, without links."""
    for net_id in tenants:
        tenant_net = net_of(net_id)
        await net.mechanisms.tenant_rules.ensure(TenantRulesSpec(f"t{net_id}", tenant_net))
        await net.mechanisms.pins.ensure(GuestPlan(f"t{net_id}", tenant_net, 5).pin)


async def test_a_tenant_adds_elements_and_no_rule(net: HostNet) -> None:
    """So a packet's way does not grow: no rule, no chain, every lookup in a hash set."""
    await net.mechanisms.networks.prepare()
    await fill(net, range(1, 2))
    one = net.host.ruleset()

    await fill(net, range(2, 60))

    many = net.host.command("nft", "-s", "-j", "list", "ruleset")
    assert many.count('"br-tenant-59"') == 2 * 3, "the tables and the guard"
    terse = net.host.ruleset("-t")
    assert terse.splitlines() == rules_only(one)
    intervals = [line for line in terse.splitlines() if "flags interval" in line]
    assert len(intervals) == 2 * 3, "denied, tenant_allowed, tenant_denied: the operator's networks"


async def test_doing_all_twice_gives_the_same_bytes(net: HostNet) -> None:
    await set_up(net, "acme", ACME)
    await plug_in(net, GUEST)
    once = net.host.ruleset()

    await set_up(net, "acme", ACME)
    await plug_in(net, GUEST)

    assert net.host.ruleset() == once


async def test_a_restarted_worker_finds_its_rules_and_gives_the_same_bytes(net: HostNet) -> None:
    await set_up(net, "acme", ACME)
    await plug_in(net, GUEST)
    before = net.host.ruleset()

    net.reopen(NetworkSettings())
    await set_up(net, "acme", ACME)
    await plug_in(net, GUEST)

    assert net.host.ruleset() == before


async def test_coming_and_going_of_others_leaves_the_same_bytes(net: HostNet) -> None:
    await set_up(net, "acme", ACME)
    before = net.host.ruleset()

    await fill(net, range(10, 20))
    for net_id in range(10, 20):
        key = TenantRulesSpec(f"t{net_id}", net_of(net_id)).key
        await net.mechanisms.tenant_rules.remove(key)

    assert net.host.ruleset() == before


async def test_other_tables_are_not_touched(net: HostNet) -> None:
    net.host.nft(
        "add table inet operator\n"
        "add set inet operator s { type ipv4_addr; elements = { 192.0.2.1 }; }\n"
        "add chain inet operator f { type filter hook forward priority 10; policy drop; }\n"
        "add rule inet operator f ip saddr @s counter accept\n"
    )
    before = net.host.command("nft", "-s", "list", "table", "inet", "operator")

    await set_up(net, "acme", ACME)
    await net.mechanisms.bridges.remove(ACME.bridge_name)
    await net.mechanisms.tenant_rules.remove(TenantRulesSpec("acme", ACME).key)

    assert net.host.command("nft", "-s", "list", "table", "inet", "operator") == before


async def test_tables_of_an_older_layout_are_replaced_and_guests_stay_pinned(net: HostNet) -> None:
    await set_up(net, "acme", ACME)
    await plug_in(net, GUEST)
    before = net.host.ruleset()
    net.host.nft(
        "delete table inet hostd\n"
        "add table inet hostd\n"
        "add set inet hostd tenants { type ifname; elements = { br-tenant-3 }; }\n"
        "add set inet hostd dropped { type ifname; elements = { br-tenant-3 }; }\n"
        "add set inet hostd gateways { type ifname . ipv4_addr; }\n"
        "add element inet hostd gateways { br-tenant-3 . 10.240.3.1 }\n"
        "add map inet hostd uplinks { type ifname : verdict; }\n"
        "add chain inet hostd old { type filter hook forward priority 5; policy drop; }\n"
    )
    net.reopen(NetworkSettings())

    await net.mechanisms.networks.prepare()

    assert net.host.ruleset() == before


async def test_uplinks_follow_the_default_route(net: HostNet) -> None:
    await net.mechanisms.networks.prepare()
    net.host.ip("link add up1 type veth peer name peer1")
    net.host.ip("link set up1 up")
    net.host.ip("addr add 192.0.2.1/24 dev up1")
    net.host.ip("route replace default via 192.0.2.2 dev up1")

    assert await net.mechanisms.networks.prepare()

    assert 'elements = { "up1" }' in net.host.command(
        "nft", "list", "set", "inet", "hostd", "uplinks"
    )


async def test_a_default_route_that_went_away_and_came_back_is_an_uplink_again(
    net: HostNet,
) -> None:
    await net.mechanisms.networks.prepare()
    before = net.host.ruleset()
    net.host.ip("route del default")
    await net.mechanisms.networks.prepare()
    assert net.host.ruleset() != before

    net.host.ip(f"route add default via {OUTSIDE}")
    await net.mechanisms.networks.prepare()

    assert net.host.ruleset() == before


async def test_uplinks_that_are_set_win(net: HostNet) -> None:
    mechanisms = net.reopen(NetworkSettings(uplinks=("wan0", "wan1")))

    await mechanisms.networks.prepare()

    listed = net.host.command("nft", "list", "set", "inet", "hostd", "uplinks")
    assert '"wan0"' in listed
    assert '"wan1"' in listed
    assert '"up0"' not in listed


async def test_without_the_library_the_program_does_the_same(
    net: HostNet, opened: Callable[[Callable[[], Engine]], Nft]
) -> None:
    await net.mechanisms.networks.prepare()
    await net.mechanisms.pins.ensure(GUEST.pin)
    by_library = net.host.ruleset()
    net.host.nft("flush ruleset")
    nft = opened(Program)
    base = BaseRules(nft, NetworkSettings())

    await base.ensure(["up0"])
    assert await Pins(nft, base).ensure(GUEST.pin)
    assert not await Pins(nft, base).ensure(GUEST.pin)

    assert net.host.ruleset() == by_library


def test_the_library_is_preferred() -> None:
    engine = open_engine()

    assert isinstance(engine, Library)
    engine.close()


class LyingLibrary(Library):
    """Says that it did what it was asked to, and leaves out the pins."""

    def __init__(self) -> None:
        super().__init__()
        assert self.socket is not None
        self.socket.close()
        self.socket = None

    def run(self, text: str, flags: int) -> str:
        kept = [line for line in text.splitlines() if "add element bridge hostd pins" not in line]
        return super().run("\n".join(kept) + "\n", flags)


class LyingSocket(socket.socket):
    """Says that it did what it was asked to, and pins another address."""

    def send(self, data: "ReadableBuffer", flags: int = 0, /) -> int:
        sent = bytes(data)
        if sent[4:6] == NFNL_MSG_BATCH_BEGIN.to_bytes(2, "little"):
            sent = sent.replace(socket.inet_aton(GUEST.ip), socket.inet_aton("10.240.3.99"))
        return super().send(sent, flags)


class LibraryOnALyingSocket(Library):
    def __init__(self) -> None:
        super().__init__()
        assert self.socket is not None
        self.socket = LyingSocket(fileno=self.socket.detach())


class ForgetfulLibrary(Library):
    """Says that it did what it was asked to, and leaves out one rule."""

    def run(self, text: str, flags: int) -> str:
        kept = [line for line in text.splitlines() if not line.endswith("@pins accept")]
        return super().run("\n".join(kept) + "\n", flags)


@pytest.mark.parametrize("engine", [LyingLibrary, LibraryOnALyingSocket])
async def test_a_pin_that_is_not_in_force_is_a_fault(
    net: HostNet, opened: Callable[[Callable[[], Engine]], Nft], engine: Callable[[], Engine]
) -> None:
    nft = opened(engine)

    with pytest.raises(HostFault, match="anti-spoofing entry for tn3i5 missing"):
        await Pins(nft, BaseRules(nft, NetworkSettings())).ensure(GUEST.pin)


async def test_base_rules_that_are_not_in_force_are_a_fault(
    net: HostNet, opened: Callable[[Callable[[], Engine]], Nft]
) -> None:
    nft = opened(ForgetfulLibrary)

    with pytest.raises(HostFault, match="base ruleset differs"):
        await BaseRules(nft, NetworkSettings()).ensure()


async def test_a_transaction_takes_effect_as_a_whole_or_not_at_all(net: HostNet) -> None:
    await net.mechanisms.networks.prepare()
    before = net.host.ruleset()

    with pytest.raises(HostFault):
        await net.mechanisms.nft.run(
            lambda tables: tables.change(
                add=[("inet hostd tenants", ("br-tenant-9",)), ("inet hostd none", ("x",))]
            )
        )

    assert net.host.ruleset() == before


async def test_many_at_once_all_take_effect(net: HostNet) -> None:
    await net.mechanisms.networks.prepare()
    nets = [net_of(net_id) for net_id in range(20, 40)]

    await asyncio.gather(
        *(
            net.mechanisms.tenant_rules.ensure(TenantRulesSpec(f"t{n.tenant_net_id}", n))
            for n in nets
        ),
        *(net.mechanisms.bridges.ensure(BridgeSpec(f"t{n.tenant_net_id}", n)) for n in nets),
    )

    bridges, taps = await net.mechanisms.networks.owned_links()
    assert sorted(bridges) == sorted(n.bridge_name for n in nets)
    assert taps == ()
    elements = [
        await net.mechanisms.nft.members(f"{family} hostd {name}")
        for family, names in CARRIED.items()
        for name in names
    ]
    assert sum(map(len, elements)) == 3 * len(nets)
