"""SetupNetwork, TeardownNetwork and repair against the real kernel."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from handlers.errors import Conflict, Failure, HostFault, Invalid, NotFound
from handlers.host.net import taps
from handlers.host.net.bridges import Bridges
from handlers.host.net.rtnetlink import Kernel
from handlers.host.net.rtnetlink_reader import IFLA_TUN_OWNER
from handlers.host.net.taps import FLAGS, SeizedTap, open_tap, seize_tap
from handlers.interfaces import Host
from handlers.network import restore_network, setup_network, teardown_network
from handlers.specs import BridgeSpec, Restored
from handlers.steps import Done
from schemas.records import InstanceRecord, Status, VmmIdentity
from schemas.requests import InstanceRef, SetupNetwork, TeardownNetwork, TenantNet
from tests.kernel.net.memory_records import MemoryRecords, MemoryStepLog, host_of, steps_of
from tests.kernel.net.netns import HostNet, TapGuest
from tests.kernel.net.plans import OWNER_UID, GuestPlan, net_of, plug_in

ACME, UMBRA = net_of(3), net_of(300)
GUEST = GuestPlan("acme", ACME, 5)
REF = InstanceRef("acme", "pool", "i5")
VMM = VmmIdentity(1, 1, 1, 1, "hostd/acme/x", "boot")


@dataclass
class Desk:
    """A host, its journal, and the commands to run on it."""

    net: HostNet
    journal: MemoryRecords
    host: Host
    log: MemoryStepLog = field(default_factory=MemoryStepLog)
    given: int = 0

    async def setup(self, tenant_id: str, net: TenantNet) -> Done:
        self.given += 1
        steps = steps_of(self.host, self.log, f"cmd-{self.given}")
        try:
            return await setup_network(SetupNetwork(tenant_id, net), steps, self.host)
        except Failure:
            assert await steps.undo() == ()
            raise

    async def teardown(self, tenant_id: str, net: TenantNet) -> Done:
        self.given += 1
        steps = steps_of(self.host, self.log, f"cmd-{self.given}")
        done = await teardown_network(TeardownNetwork(tenant_id, net), steps, self.host)
        if done.network is not None:  # the journal deletes it with the outcome
            del self.journal.networks_up[tenant_id]
        return done

    def looks(self) -> tuple[str, str, str]:
        """All of the network that hostd may have changed."""
        host = self.net.host
        links = [line.split()[0] for line in host.ip("-br link").splitlines()]
        return host.ruleset(), " ".join(links), host.ip("route").replace(" linkdown", "")

    async def run_guest(self, status: Status = Status.RUNNING) -> None:
        await plug_in(self.net, GUEST)
        record = InstanceRecord(
            ref=REF, status=status, since_ms=0, net=ACME, offset=5, uid_slot=7, vmm=VMM
        )
        self.journal.records[REF] = record
        self.journal.jails_alive.add(record.jail_id)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    with HostNet() as net:
        journal = MemoryRecords({"acme": ACME, "umbra": UMBRA})
        yield Desk(net, journal, host_of(net, journal))


async def test_setup_puts_the_network_up_and_on_record(desk: Desk) -> None:
    done = await desk.setup("acme", ACME)

    assert done.changed
    link = await desk.net.link(ACME.bridge_name)
    assert link is not None
    assert link.up
    assert desk.journal.networks_up["acme"].net == ACME
    assert desk.journal.networks_up["acme"].status == "up"
    assert desk.net.host.sysctl("ipv4/ip_forward") == "1"


async def test_setup_again_changes_nothing(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    looks = desk.looks()

    done = await desk.setup("acme", ACME)

    assert not done.changed
    assert desk.looks() == looks


async def test_a_run_after_a_crash_says_what_the_first_one_changed(desk: Desk) -> None:
    command = SetupNetwork("acme", ACME)
    await setup_network(command, steps_of(desk.host, desk.log), desk.host)

    done = await setup_network(command, steps_of(desk.host, desk.log), desk.host)

    assert done.changed


async def test_teardown_leaves_nothing_but_the_base_table(desk: Desk) -> None:
    await desk.host.networks.prepare()
    before = desk.looks()
    await desk.setup("acme", ACME)

    done = await desk.teardown("acme", ACME)

    assert done.changed
    assert desk.looks() == before
    assert desk.journal.networks_up == {}


async def test_teardown_of_what_is_not_there_is_ok(desk: Desk) -> None:
    done = await desk.teardown("acme", ACME)

    assert not done.changed


async def test_teardown_works_without_tenant_json(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    del desk.journal.tenants["acme"]

    assert (await desk.teardown("acme", ACME)).changed


async def test_teardown_with_a_tap_in_use_is_a_conflict_and_changes_nothing(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    await plug_in(desk.net, GUEST)
    looks = desk.looks()

    with pytest.raises(Conflict, match=GUEST.tap):
        await desk.teardown("acme", ACME)

    assert desk.looks() == looks


async def test_teardown_asks_the_journal_too(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    await desk.run_guest(Status.STARTING)
    await desk.net.mechanisms.taps.remove(GUEST.tap)

    with pytest.raises(Conflict, match="acme/pool/i5"):
        await desk.teardown("acme", ACME)


async def test_a_sleeper_does_not_hold_the_network(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    await desk.run_guest(Status.SLEEPING)
    await desk.net.mechanisms.taps.remove(GUEST.tap)

    assert (await desk.teardown("acme", ACME)).changed


def altered(**changes: object) -> TenantNet:
    return msgspec.structs.replace(ACME, **changes)


@pytest.mark.parametrize(
    ("net", "at"),
    [
        (altered(ipv4_subnet="192.168.3.0/24", gateway_ip="192.168.3.1"), "ipv4_subnet"),
        (altered(ipv4_subnet="10.240.3.7/24"), "ipv4_subnet"),
        (altered(gateway_ip="10.240.4.1"), "gateway_ip"),
        (altered(bridge_name="br-tenant-4"), "bridge_name"),
        (altered(tenant_net_id=4096, bridge_name="br-tenant-4096"), "tenant_net_id"),
    ],
)
async def test_an_unsound_net_is_invalid_and_changes_nothing(
    desk: Desk, net: TenantNet, at: str
) -> None:
    looks = desk.looks()

    with pytest.raises(Invalid) as caught:
        await desk.setup("acme", net)

    assert caught.value.path == f"$.request.SetupNetwork.net.{at}"
    assert desk.looks() == looks


async def test_a_net_that_is_not_tenant_jsons_is_a_conflict(desk: Desk) -> None:
    with pytest.raises(Conflict, match=r"tenant\.json"):
        await desk.setup("acme", net_of(4))


async def test_an_unknown_tenant_is_not_found(desk: Desk) -> None:
    with pytest.raises(NotFound):
        await desk.setup("nobody", ACME)


@pytest.mark.parametrize(
    "net",
    [
        altered(ipv4_subnet="10.250.0.0/24", gateway_ip="10.250.0.1"),
        TenantNet(9, "10.240.3.128/25", "10.240.3.129", "br-tenant-9"),
    ],
)
async def test_net_id_and_subnet_belong_to_one_tenant(desk: Desk, net: TenantNet) -> None:
    await desk.setup("acme", ACME)
    desk.journal.tenants["umbra"] = net
    looks = desk.looks()

    with pytest.raises(Conflict, match="acme"):
        await desk.setup("umbra", net)
    with pytest.raises(Conflict, match="acme"):
        await desk.teardown("umbra", net)

    assert desk.looks() == looks


async def test_a_route_of_the_host_is_a_conflict(desk: Desk) -> None:
    desk.net.host.ip("route add 10.240.3.64/26 via 198.51.100.2")
    looks = desk.looks()

    with pytest.raises(Conflict, match=r"10\.240\.3\.64/26"):
        await desk.setup("acme", ACME)

    assert desk.looks() == looks


async def test_another_net_for_a_network_that_is_up_is_a_conflict(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    desk.journal.tenants["acme"] = net_of(4)

    with pytest.raises(Conflict, match="send TeardownNetwork first"):
        await desk.setup("acme", net_of(4))

    assert (await desk.teardown("acme", ACME)).changed
    assert (await desk.setup("acme", net_of(4))).changed


@pytest.mark.parametrize(
    "half",
    [
        "link add br-tenant-3 type bridge",
        "link add br-tenant-3 address 02:00:00:00:00:01 up type bridge stp_state 1",
    ],
)
async def test_a_half_made_bridge_is_completed(desk: Desk, half: str) -> None:
    desk.net.host.ip(half)

    done = await desk.setup("acme", ACME)

    assert done.changed
    assert not (await desk.setup("acme", ACME)).changed


@pytest.mark.parametrize(
    "harm",
    [
        "link set br-tenant-3 down",
        "addr del 10.240.3.1/24 dev br-tenant-3",
        "addr add 10.240.3.9/24 dev br-tenant-3",
        "route del 10.240.3.0/24",
        "link set br-tenant-3 address 02:00:00:00:00:01",
        "link set br-tenant-3 type bridge stp_state 1",
        "link set br-tenant-3 alias ",
        "link del br-tenant-3",
    ],
)
async def test_harm_to_the_bridge_is_repaired(desk: Desk, harm: str) -> None:
    await desk.setup("acme", ACME)
    looks = desk.looks()
    desk.net.host.command("ip", *harm.split(" "))

    restored = await restore_network(desk.journal.networks_up["acme"], desk.host)

    assert restored == Restored(("bridge br-tenant-3",), ())
    assert desk.looks()[0] == looks[0]
    assert desk.looks()[2] == looks[2]
    assert await restore_network(desk.journal.networks_up["acme"], desk.host) == Restored((), ())


@pytest.mark.parametrize(
    ("harm", "repaired"),
    [
        ("flush ruleset", ("base_rules", "tenant_rules", "pin")),
        ("delete table bridge hostd", ("base_rules", "pin")),
        ("flush chain inet hostd from_tenant", ("base_rules",)),
        ("insert rule inet hostd forward accept", ("base_rules",)),
        ("add chain inet hostd more { type filter hook forward priority -5; }", ("base_rules",)),
        ('add element inet hostd uplinks { "lo" }', ("base_rules",)),
        ('delete element inet hostd tenants { "br-tenant-3" }', ("tenant_rules",)),
        ('delete element inet hostd gateways { "br-tenant-3" . 10.240.3.1 }', ("tenant_rules",)),
        ('add element inet hostd gateways { "br-tenant-3" . 10.240.3.2 }', ("tenant_rules",)),
        ('delete element bridge hostd guests { "tn3i5" }', ("pin",)),
        ('add element bridge hostd pins { "tn3i5" . 02:fc:00:03:00:06 . 10.240.3.6 }', ("pin",)),
    ],
)
async def test_harm_to_the_rules_is_repaired(
    desk: Desk, harm: str, repaired: tuple[str, ...]
) -> None:
    await desk.setup("acme", ACME)
    await desk.run_guest()
    ruleset = desk.net.host.ruleset()
    desk.net.host.nft(harm)

    restored = await restore_network(desk.journal.networks_up["acme"], desk.host)

    assert tuple(name.split()[0] for name in restored.repaired) == repaired
    assert desk.net.host.ruleset() == ruleset


@pytest.mark.parametrize(
    "harm",
    [
        "link set tn3i5 nomaster",
        "link set tn3i5 down",
        "link set tn3i5 type bridge_slave isolated on",
        "link set tn3i5 type bridge_slave learning on",
        "neigh del 10.240.3.5 dev br-tenant-3",
        "link del br-tenant-3",
    ],
)
async def test_harm_to_a_live_guests_tap_is_repaired(desk: Desk, harm: str) -> None:
    await desk.setup("acme", ACME)
    await desk.run_guest()
    guest = TapGuest(desk.net, GUEST.tap)
    desk.net.host.ip(harm)

    restored = await restore_network(desk.journal.networks_up["acme"], desk.host)

    assert restored.repaired[-1] == f"tap {GUEST.tap}"
    assert restored.lost == ()
    assert not await desk.net.mechanisms.taps.ensure(GUEST.spec)
    guest.close()


async def test_a_live_guests_tap_that_is_gone_is_lost_and_not_made_again(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    await desk.run_guest()
    await desk.net.mechanisms.taps.remove(GUEST.tap)

    restored = await restore_network(desk.journal.networks_up["acme"], desk.host)

    assert restored == Restored((), (f"tap {GUEST.tap}",))


async def test_an_instance_that_gives_up_its_place_gets_no_pin_again(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    ruleset = desk.net.host.ruleset()
    await desk.run_guest(Status.STOPPING)
    desk.journal.jails_alive.clear()
    await desk.net.mechanisms.taps.remove(GUEST.tap)
    await desk.net.mechanisms.pins.remove(GUEST.pin.key)

    restored = await restore_network(desk.journal.networks_up["acme"], desk.host)

    assert restored == Restored((), ())
    assert desk.net.host.ruleset() == ruleset


async def test_a_network_torn_down_meanwhile_is_not_restored(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    record = desk.journal.networks_up["acme"]
    await desk.teardown("acme", ACME)

    assert await restore_network(record, desk.host) == Restored((), ())
    assert await desk.net.link(ACME.bridge_name) is None


class BrokenBridges(Bridges):
    """The last step of a setup fails after its effect."""

    async def ensure(self, spec: BridgeSpec) -> bool:
        await super().ensure(spec)
        raise HostFault("the bridge does not hold its address")


async def test_a_setup_that_fails_leaves_the_host_as_it_was(desk: Desk) -> None:
    await desk.host.networks.prepare()
    looks = desk.looks()
    desk.host = host_of(desk.net, desk.journal)
    broken = BrokenBridges(desk.net.mechanisms.netlink)
    object.__setattr__(desk.host, "bridges", broken)

    with pytest.raises(HostFault):
        await desk.setup("acme", ACME)

    assert desk.looks() == looks
    assert desk.journal.networks_up == {}


async def test_owner_of_the_tap_is_the_launchs_uid_and_follows_it(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    await plug_in(desk.net, GUEST)

    next_launch = replace(GUEST.spec, owner_uid=OWNER_UID + 1)
    changed = await desk.net.mechanisms.taps.ensure(next_launch)

    link = await desk.net.link(GUEST.tap)
    assert changed
    assert link is not None
    assert link.info[IFLA_TUN_OWNER] == OWNER_UID + 1


async def test_nobody_attaches_to_a_tap_that_is_being_released(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    await plug_in(desk.net, GUEST)

    seized = await desk.net.mechanisms.netlink.run(lambda kernel: seize_tap(kernel, GUEST.tap))

    assert seized is not None
    with pytest.raises(Conflict, match="in use"):
        desk.net.host.run(lambda: open_tap(GUEST.tap, FLAGS))
    os.close(seized.descriptor)
    assert await desk.net.link(GUEST.tap) is None


async def test_a_child_that_is_being_spawned_does_not_keep_a_released_tap(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await desk.setup("acme", ACME)
    await plug_in(desk.net, GUEST)
    copies: list[int] = []

    def copied(kernel: Kernel, name: str) -> SeizedTap | None:
        seized = seize_tap(kernel, name)
        assert seized is not None
        copies.append(os.dup(seized.descriptor))  # as vfork does
        return seized

    monkeypatch.setattr(taps, "seize_tap", copied)
    await desk.net.mechanisms.taps.release(GUEST.tap)
    monkeypatch.undo()

    assert await desk.net.mechanisms.taps.ensure(GUEST.spec)
    assert await desk.net.link(GUEST.tap) is not None
    for copy in copies:
        os.close(copy)
    assert await desk.net.link(GUEST.tap) is not None


async def test_the_tap_of_a_release_that_was_killed_is_deleted_by_the_kernel(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    await plug_in(desk.net, GUEST)
    seized = await desk.net.mechanisms.netlink.run(lambda kernel: seize_tap(kernel, GUEST.tap))
    assert seized is not None
    worker = subprocess.Popen(["sleep", "infinity"], pass_fds=[seized.descriptor])
    os.close(seized.descriptor)
    assert await desk.net.link(GUEST.tap) is not None, "the process that is killed has it"

    worker.kill()
    worker.wait()

    assert await desk.net.link(GUEST.tap) is None


async def test_a_tap_that_a_process_has_open_is_deleted_by_its_release(desk: Desk) -> None:
    await desk.setup("acme", ACME)
    await plug_in(desk.net, GUEST)
    guest = TapGuest(desk.net, GUEST.tap)

    await desk.net.mechanisms.taps.release(GUEST.tap)

    assert await desk.net.link(GUEST.tap) is None
    guest.close()


async def test_of_two_tenants_who_ask_for_one_subnet_at_once_one_gets_it(desk: Desk) -> None:
    desk.journal.tenants["umbra"] = TenantNet(9, ACME.ipv4_subnet, ACME.gateway_ip, "br-tenant-9")

    results = await asyncio.gather(
        desk.setup("acme", ACME),
        desk.setup("umbra", desk.journal.tenants["umbra"]),
        return_exceptions=True,
    )

    assert [type(result) for result in results].count(Conflict) == 1
    assert len(desk.journal.networks_up) == 1
    bridges, _taps = await desk.net.mechanisms.networks.owned_links()
    assert len(bridges) == 1
