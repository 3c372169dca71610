"""What every implementation of the network mechanisms keeps to: the real one and the fake.

An implementation is a factory: it makes an empty host and gives its mechanisms and the few things
that happen on a host behind hostd's back.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, cast

import pytest

from handlers.claims.unrecorded import TapOwner
from handlers.errors import Conflict
from handlers.interfaces import Networks, Records, Taps
from handlers.mechanism import Mechanism, Removable
from handlers.specs import BridgeSpec, ExpectedNetwork, PinSpec, TenantRulesSpec
from tests.fakes import host as fake
from tests.kernel.net.netns import HostNet
from tests.kernel.net.plans import GuestPlan, net_of

ACME, UMBRA = net_of(3), net_of(300)
GUEST = GuestPlan("acme", ACME, 5)
BRIDGE = BridgeSpec("acme", ACME)
RULES = TenantRulesSpec("acme", ACME)


class NetworkHost(Protocol):
    """An implementation under test."""

    @property
    def networks(self) -> Networks: ...

    @property
    def bridges(self) -> Mechanism[BridgeSpec, bool]: ...

    @property
    def tenant_rules(self) -> Mechanism[TenantRulesSpec, bool]: ...

    @property
    def pins(self) -> Mechanism[PinSpec, bool]: ...

    @property
    def taps(self) -> Taps: ...

    async def plant_link(self, name: str) -> None:
        """A link that is not hostd's appears."""
        ...

    async def plant_route(self, subnet: str) -> None:
        """A route that is not hostd's appears."""
        ...

    async def has_link(self, name: str) -> bool: ...


class RealNetworkHost:
    """The kernel's, in a namespace of its own."""

    def __init__(self, net: HostNet) -> None:
        self._net = net
        self.networks = net.mechanisms.networks
        self.bridges = net.mechanisms.bridges
        self.tenant_rules = net.mechanisms.tenant_rules
        self.pins = net.mechanisms.pins
        self.taps = net.mechanisms.taps

    async def plant_link(self, name: str) -> None:
        self._net.host.ip(f"tuntap add {name} mode tap")

    async def plant_route(self, subnet: str) -> None:
        self._net.host.ip(f"route add {subnet} via 198.51.100.2")

    async def has_link(self, name: str) -> bool:
        return await self._net.link(name) is not None


@asynccontextmanager
async def real() -> AsyncGenerator[NetworkHost]:
    with HostNet() as net:
        yield RealNetworkHost(net)


class FakeNetworkHost:
    """The one in memory."""

    def __init__(self) -> None:
        self._machine = fake.FakeHost()
        host = self._machine.host(cast("Records", None))
        self.networks = host.networks
        self.bridges = host.bridges
        self.tenant_rules = host.tenant_rules
        self.pins = host.pins
        self.taps = host.taps

    async def plant_link(self, name: str) -> None:
        self._machine.plant_link(name)

    async def plant_route(self, subnet: str) -> None:
        self._machine.routes.append(subnet)

    async def has_link(self, name: str) -> bool:
        return self._machine.has_link(name)


@asynccontextmanager
async def in_memory() -> AsyncGenerator[NetworkHost]:
    yield FakeNetworkHost()


Factory = Callable[[], AbstractAsyncContextManager[NetworkHost]]
IMPLEMENTATIONS: dict[str, Factory] = {"real": real, "fake": in_memory}


@pytest.fixture(params=IMPLEMENTATIONS)
async def host(request: pytest.FixtureRequest) -> AsyncIterator[NetworkHost]:
    async with IMPLEMENTATIONS[request.param]() as made:
        yield made


class TestNetworkMechanisms:
    async def test_a_network_is_made_once_and_found_after(self, host: NetworkHost) -> None:
        assert await host.networks.prepare()

        assert await host.tenant_rules.ensure(RULES)
        assert await host.bridges.ensure(BRIDGE)

        assert not await host.networks.prepare()
        assert not await host.tenant_rules.ensure(RULES)
        assert not await host.bridges.ensure(BRIDGE)
        assert await host.tenant_rules.exists(RULES.key)
        assert await host.bridges.exists(BRIDGE.key)

    async def test_a_guest_is_plugged_in_once_and_found_after(self, host: NetworkHost) -> None:
        await self.set_up(host)

        assert await host.pins.ensure(GUEST.pin)
        assert await host.taps.ensure(GUEST.spec)

        assert not await host.pins.ensure(GUEST.pin)
        assert not await host.taps.ensure(GUEST.spec)
        assert await host.pins.exists(GUEST.pin.key)
        assert await host.taps.exists(GUEST.spec.key)
        assert list(await host.networks.taps_on(ACME.bridge_name)) == [GUEST.tap]

    async def test_all_is_removed_by_key_alone_and_absent_is_success(
        self, host: NetworkHost
    ) -> None:
        await self.set_up(host)
        await host.pins.ensure(GUEST.pin)
        await host.taps.ensure(GUEST.spec)
        made: list[tuple[Removable, str]] = [
            (host.taps, GUEST.spec.key),
            (host.pins, GUEST.pin.key),
            (host.bridges, BRIDGE.key),
            (host.tenant_rules, RULES.key),
        ]

        for _twice in range(2):
            for mechanism, key in made:
                await mechanism.remove(key)

                assert not await mechanism.exists(key)
        assert not await host.has_link(GUEST.tap)
        assert not await host.has_link(ACME.bridge_name)

    async def test_a_tap_that_is_released_is_gone_once_it_has_settled(
        self, host: NetworkHost
    ) -> None:
        await self.set_up(host)
        await host.taps.ensure(GUEST.spec)

        for _twice in range(2):
            await host.taps.release(GUEST.spec.key)
            assert not await host.taps.exists(GUEST.spec.key)

        await host.taps.settle(ACME.tenant_net_id)
        assert not await host.has_link(GUEST.tap)
        assert list(await host.networks.taps_on(ACME.bridge_name)) == []

    async def test_a_tap_is_made_and_removed_right_after_its_release(
        self, host: NetworkHost
    ) -> None:
        await self.set_up(host)
        for _again in range(5):
            assert await host.taps.ensure(GUEST.spec)
            await host.taps.release(GUEST.spec.key)
        assert await host.taps.ensure(GUEST.spec)
        assert not await host.taps.ensure(GUEST.spec)

        await host.taps.release(GUEST.spec.key)
        await host.taps.remove(GUEST.spec.key)

        assert not await host.has_link(GUEST.tap)

    async def test_a_foreign_link_with_the_taps_name_is_not_released(
        self, host: NetworkHost
    ) -> None:
        await self.set_up(host)
        await host.plant_link(GUEST.tap)

        await host.taps.release(GUEST.spec.key)
        await host.taps.settle(ACME.tenant_net_id)

        assert await host.has_link(GUEST.tap)

    async def test_nothing_is_there_before_the_base_table_is(self, host: NetworkHost) -> None:
        assert not await host.tenant_rules.exists(RULES.key)
        assert not await host.pins.exists(GUEST.pin.key)
        await host.tenant_rules.remove(RULES.key)
        await host.pins.remove(GUEST.pin.key)

    async def test_one_tenants_end_leaves_the_others(self, host: NetworkHost) -> None:
        await self.set_up(host)
        await host.tenant_rules.ensure(TenantRulesSpec("umbra", UMBRA))
        await host.bridges.ensure(BridgeSpec("umbra", UMBRA))

        await host.bridges.remove(UMBRA.bridge_name)
        await host.tenant_rules.remove(TenantRulesSpec("umbra", UMBRA).key)

        assert not await host.tenant_rules.ensure(RULES)
        assert not await host.bridges.ensure(BRIDGE)

    async def test_a_foreign_link_with_the_taps_name_is_a_conflict_and_left_alone(
        self, host: NetworkHost
    ) -> None:
        await self.set_up(host)
        await host.plant_link(GUEST.tap)

        with pytest.raises(Conflict):
            await host.taps.ensure(GUEST.spec)
        await host.taps.remove(GUEST.spec.key)

        assert not await host.taps.exists(GUEST.spec.key)
        assert await host.has_link(GUEST.tap)

    async def test_a_foreign_link_with_the_bridges_name_is_a_conflict_and_left_alone(
        self, host: NetworkHost
    ) -> None:
        await host.plant_link(ACME.bridge_name)

        with pytest.raises(Conflict):
            await host.bridges.ensure(BRIDGE)
        await host.bridges.remove(BRIDGE.key)

        assert not await host.bridges.exists(BRIDGE.key)
        assert await host.has_link(ACME.bridge_name)

    async def test_another_tenants_bridge_or_tap_is_a_conflict(self, host: NetworkHost) -> None:
        await self.set_up(host)
        await host.taps.ensure(GUEST.spec)

        with pytest.raises(Conflict):
            await host.bridges.ensure(BridgeSpec("umbra", ACME))
        with pytest.raises(Conflict):
            await host.taps.ensure(GuestPlan("umbra", ACME, 5).spec)

    async def test_a_tap_needs_its_bridge(self, host: NetworkHost) -> None:
        with pytest.raises(Conflict):
            await host.taps.ensure(GUEST.spec)

        assert not await host.has_link(GUEST.tap)

    async def test_a_route_that_overlaps_is_found(self, host: NetworkHost) -> None:
        async def overlapping(subnet: str) -> str | None:
            return await host.networks.overlapping_route(subnet, except_bridge=ACME.bridge_name)

        await self.set_up(host)
        await host.plant_route("10.250.1.0/25")

        assert await overlapping("10.250.1.0/24") == "10.250.1.0/25"
        assert await overlapping("10.250.1.64/26") == "10.250.1.0/25"
        assert await overlapping("10.250.2.0/24") is None
        assert await overlapping(ACME.ipv4_subnet) is None, "the bridge's own route"

    async def test_whose_network_is_not_as_expected_is_named(self, host: NetworkHost) -> None:
        expected = [ExpectedNetwork(RULES, BRIDGE, ((GUEST.pin, GUEST.spec),))]

        async def damaged(*, rules_only: bool) -> list[str]:
            return list(await host.networks.damaged(expected, rules_only=rules_only))

        await self.set_up(host)
        await host.pins.ensure(GUEST.pin)
        assert await damaged(rules_only=True) == []
        assert await damaged(rules_only=False) == ["acme"], "there is no TAP"
        await host.taps.ensure(GUEST.spec)
        assert await damaged(rules_only=False) == []
        await host.pins.remove(GUEST.pin.key)
        assert await damaged(rules_only=True) == ["acme"]

    async def test_no_bridge_has_no_taps(self, host: NetworkHost) -> None:
        assert list(await host.networks.taps_on("br-tenant-9")) == []

    async def set_up(self, host: NetworkHost) -> None:
        await host.networks.prepare()
        await host.tenant_rules.ensure(RULES)
        await host.bridges.ensure(BRIDGE)

    async def test_whose_a_tap_is_is_listed_until_it_is_released(self, host: NetworkHost) -> None:
        assert await host.taps.owners() == {}
        await host.tenant_rules.ensure(RULES)
        await host.bridges.ensure(BRIDGE)
        await host.plant_link("tn3i9")
        await host.pins.ensure(GUEST.pin)
        await host.taps.ensure(GUEST.spec)

        owners = await host.taps.owners()

        spec = GUEST.spec
        assert owners == {spec.name: TapOwner("acme/pool/i5", spec.owner_uid)}
        await host.taps.release(spec.key)
        assert await host.taps.owners() == {}
