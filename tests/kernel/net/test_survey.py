"""What others did to a network is found by listings of the whole host, at that tenant alone."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from handlers.interfaces import Host
from handlers.network import restore_network
from handlers.network_survey import damaged_tenants
from schemas.records import InstanceRecord, NetworkRecord, Status, VmmIdentity
from schemas.requests import InstanceRef
from tests.kernel.net.memory_records import MemoryRecords, host_of
from tests.kernel.net.netns import HostNet
from tests.kernel.net.plans import GuestPlan, net_of, plug_in, set_up

TENANTS = {"acme": net_of(3), "umbra": net_of(300)}
VMM = VmmIdentity(1, 1, 1, 1, "hostd/acme/x", "boot")
RULES = (
    'delete element inet hostd tenants { "br-tenant-3" }',
    'delete element inet hostd dropped { "br-tenant-3" }',
    'delete element inet hostd gateways { "br-tenant-3" . 10.240.3.1 }',
    'add element inet hostd gateways { "br-tenant-3" . 10.240.3.2 }',
    'delete element bridge hostd guests { "tn3i5" }',
    'delete element bridge hostd pins { "tn3i5" . 02:fc:00:03:00:05 . 10.240.3.5 }',
    'add element bridge hostd pins { "tn3i5" . 02:fc:00:03:00:06 . 10.240.3.6 }',
)
LINKS = (
    "link set br-tenant-3 down",
    "addr del 10.240.3.1/24 dev br-tenant-3",
    "addr add 10.240.3.9/24 dev br-tenant-3",
    "route del 10.240.3.0/24",
    "link set br-tenant-3 address 02:00:00:00:00:01",
    "link set br-tenant-3 type bridge stp_state 1",
    "link set br-tenant-3 type bridge mcast_snooping 1",
    "link set br-tenant-3 alias x",
    "link del br-tenant-3",
    "link set tn3i5 nomaster",
    "link set tn3i5 down",
    "link set tn3i5 alias x",
    "link set tn3i5 type bridge_slave isolated on",
    "link set tn3i5 type bridge_slave learning on",
    "neigh del 10.240.3.5 dev br-tenant-3",
    "link del tn3i5",
)


@dataclass(frozen=True)
class Desk:
    net: HostNet
    journal: MemoryRecords
    host: Host


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    with HostNet() as net:
        journal = MemoryRecords(dict(TENANTS))
        for tenant, tenant_net in TENANTS.items():
            await set_up(net, tenant, tenant_net)
            plan = GuestPlan(tenant, tenant_net, 5)
            await plug_in(net, plan)
            ref = InstanceRef(tenant, "pool", "i5")
            journal.networks_up[tenant] = NetworkRecord(
                tenant_id=tenant, net=tenant_net, status="up", since_ms=0
            )
            journal.records[ref] = InstanceRecord(
                ref=ref,
                status=Status.RUNNING,
                since_ms=0,
                net=tenant_net,
                offset=5,
                uid_slot=7,
                vmm=VMM,
            )
            journal.jails_alive.add(journal.records[ref].jail_id)
        yield Desk(net, journal, host_of(net, journal))


async def test_what_hostd_left_is_not_damaged(desk: Desk) -> None:
    assert await damaged_tenants(desk.host, rules_only=False) == (False, [])


@pytest.mark.parametrize("rules_only", [True, False])
@pytest.mark.parametrize("harm", RULES)
async def test_harm_to_the_rules_is_found_at_its_tenant(
    desk: Desk, harm: str, *, rules_only: bool
) -> None:
    desk.net.host.nft(harm)

    assert await damaged_tenants(desk.host, rules_only=rules_only) == (False, ["acme"])

    await restore_network(desk.journal.networks_up["acme"], desk.host)
    assert await damaged_tenants(desk.host, rules_only=False) == (False, [])


@pytest.mark.parametrize("harm", LINKS)
async def test_harm_to_links_is_found_at_its_tenant(desk: Desk, harm: str) -> None:
    desk.net.host.ip(harm)

    assert await damaged_tenants(desk.host, rules_only=True) == (False, [])
    assert await damaged_tenants(desk.host, rules_only=False) == (False, ["acme"])


@pytest.mark.parametrize("command", ["bridge fdb del 02:fc:00:03:00:05 dev tn3i5 master"])
async def test_a_missing_fdb_entry_is_found(desk: Desk, command: str) -> None:
    desk.net.host.command(*command.split())

    assert await damaged_tenants(desk.host, rules_only=False) == (False, ["acme"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("ipv4/conf/br-tenant-3/rp_filter", "0"), ("ipv6/conf/tn3i5/disable_ipv6", "0")],
)
async def test_a_changed_sysctl_is_found(desk: Desk, name: str, value: str) -> None:
    desk.net.host.sysctl(name, value)

    assert await damaged_tenants(desk.host, rules_only=False) == (False, ["acme"])


async def test_flushed_rules_are_made_again_and_all_tenants_named(desk: Desk) -> None:
    desk.net.host.nft("flush ruleset")

    assert await damaged_tenants(desk.host, rules_only=True) == (True, ["acme", "umbra"])
    for record in desk.journal.networks():
        await restore_network(record, desk.host)
    assert await damaged_tenants(desk.host, rules_only=False) == (False, [])


async def test_without_networks_nothing_is_made(desk: Desk) -> None:
    desk.journal.networks_up.clear()
    desk.net.host.nft("flush ruleset")

    assert await damaged_tenants(desk.host, rules_only=False) == (False, ())
    assert "table inet hostd {" not in desk.net.host.ruleset()
