"""SetupNetwork and TeardownNetwork, and putting a network right again.

A network is a standing order: once set up it is kept in force until its teardown, by drift repair
and after a reboot through the same mechanisms.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network

from handlers.cancellation import together
from handlers.concurrency import held
from handlers.errors import Conflict, Invalid, NotFound
from handlers.interfaces import Host
from handlers.network_names import HOLDING_A_TAP, network_specs, port_specs
from handlers.steps import Done, Steps
from schemas.decode_error import DecodeError
from schemas.records import NetworkRecord
from schemas.requests import NetworkRequest, SetupNetwork, TeardownNetwork, TenantNet
from schemas.tenant_net import check_net


@dataclass(frozen=True, slots=True)
class Restored:
    """What a repair found. `lost` are TAPs of live instances that are gone: no VMM can get its own
    back, so the guest has no network until it is stopped and started."""

    repaired: tuple[str, ...]
    lost: tuple[str, ...]


async def setup_network(cmd: SetupNetwork, steps: Steps, host: Host) -> Done:
    """Bring a tenant's network in force: rules first, then the bridge, both read back.

    Idempotent: what is found as asked is left, a half-made network is completed. On failure what
    this command made, in any of its runs, is removed.

    Raises:
        Invalid: the net is unsound or outside `[network] allowed`.
        NotFound: the tenant has no `tenant.json`.
        Conflict: `tenant.json` or the standing order says another net; net id or subnet is
            another tenant's; a route of the host overlaps; a foreign link has the bridge's name.
        HostFault: the kernel does not hold what was set.
    """
    async with turn(cmd.tenant_id, steps, host):
        standing = await checked(cmd, host)
        rules, bridge = network_specs(cmd.tenant_id, cmd.net)
        changed, _ = await together(
            steps.act("prepare_network", host.networks.prepare),
            steps.announce((host.tenant_rules, rules.key), (host.bridges, bridge.key)),
        )
        changed = await steps.ensure(host.tenant_rules, rules) or changed
        changed = await steps.ensure(host.bridges, bridge) or changed
        if standing is None or standing.status != "up":
            await host.records.put_network(record_of(cmd, "up", host))
            changed = True
    # "Changed" belongs to the command over all its runs: a step that an earlier run made is done.
    ours = {host.tenant_rules.name, host.bridges.name}
    changed = changed or any(s.outcome == "done" and s.name in ours for s in steps.taken)
    return Done(changed=changed, status=None, detail={"bridge_name": cmd.net.bridge_name})


async def teardown_network(cmd: TeardownNetwork, steps: Steps, host: Host) -> Done:
    """Leave none of the tenant's links, rules and conntrack entries. Completed, never undone.

    Raises:
        Invalid: the net is unsound.
        Conflict: at once, while an instance holds a TAP, or if the net is not the tenant's.
    """
    async with turn(cmd.tenant_id, steps, host):
        standing = await found(cmd, host)
        await refuse_in_use(cmd, host)
        steps.finalize()
        rules, bridge = network_specs(cmd.tenant_id, cmd.net)
        present = await host.bridges.exists(bridge.key) or await host.tenant_rules.exists(rules.key)
        if standing is not None and standing.status == "up":
            await host.records.put_network(record_of(cmd, "down", host))
        # The bridge goes first: without its rules nothing must be able to pass it.
        await steps.remove(host.bridges, bridge.key)
        await steps.remove(host.tenant_rules, rules.key)
        if standing is not None:
            await host.records.drop_network(cmd.tenant_id)
    changed = present or standing is not None
    return Done(changed=changed, status=None, detail={"bridge_name": cmd.net.bridge_name})


@asynccontextmanager
async def turn(tenant_id: str, steps: Steps, host: Host) -> AsyncGenerator[None]:
    """The tenant's network to oneself, and what gives net ids and subnets to tenants."""
    async with (
        held(host.slots.networks, "wait_networks", steps),
        host.locks.exclusive(tenant_id),
        host.locks.subnets(),
    ):
        yield


async def restore_network(record: NetworkRecord, host: Host) -> Restored:
    """Put a standing network right again, its live instances' pins and TAPs included.

    For recovery and drift repair. Changes nothing, and says so, where all is in force. A TAP that
    is gone is not made anew: the VMM would not get it.

    Raises:
        Conflict, HostFault: as SetupNetwork; what came before it is repaired.
    """
    repaired: list[str] = []
    lost: list[str] = []
    async with host.locks.exclusive(record.tenant_id):
        if host.records.network(record.tenant_id) != record or record.status != "up":
            return Restored((), ())
        rules, bridge = network_specs(record.tenant_id, record.net)
        if await host.networks.prepare():
            repaired.append("base_rules")
        if await host.tenant_rules.ensure(rules):
            repaired.append(f"{host.tenant_rules.name} {rules.key}")
        if await host.bridges.ensure(bridge):
            repaired.append(f"{host.bridges.name} {bridge.key}")
        for instance in host.records.instances(record.tenant_id):
            if instance.status not in HOLDING_A_TAP or instance.vmm is None:
                continue
            pin, tap = port_specs(instance, host.settings.vmm.uid_base)
            if not await host.taps.exists(tap.key):
                # No VMM: it is giving up its place right now, the TAP first, then the pin.
                if await host.vmms.exists(instance.jail_id):
                    lost.append(f"{host.taps.name} {tap.key}")
                continue
            if await host.pins.ensure(pin):
                repaired.append(f"{host.pins.name} {pin.key}")
            if await host.taps.ensure(tap):
                repaired.append(f"{host.taps.name} {tap.key}")
    return Restored(tuple(repaired), tuple(lost))


async def checked(cmd: SetupNetwork, host: Host) -> NetworkRecord | None:
    """The tenant's standing order, once everything that could speak against the net was asked."""
    sound(cmd, host.settings.network.allowed)
    tenant, route = await together(
        host.shared.tenant(cmd.tenant_id),
        host.networks.overlapping_route(cmd.net.ipv4_subnet, except_bridge=cmd.net.bridge_name),
    )
    if tenant.net != cmd.net:
        raise Conflict("the net is not the one in tenant.json", path="$.request.SetupNetwork.net")
    refuse_anothers(cmd.tenant_id, cmd.net, host)
    standing = host.records.network(cmd.tenant_id)
    if standing is not None and standing.net != cmd.net:
        raise Conflict(f"the tenant's network is up as {standing.net.ipv4_subnet}: tear it down")
    if route is not None:
        raise Conflict(f"{cmd.net.ipv4_subnet} overlaps the host's route {route}")
    return standing


async def found(cmd: TeardownNetwork, host: Host) -> NetworkRecord | None:
    """The standing order to end. `tenant.json` is asked only where there is none: it may have been
    changed or removed since, and the network must still be possible to take down."""
    sound(cmd, host.settings.network.allowed)
    refuse_anothers(cmd.tenant_id, cmd.net, host)
    standing = host.records.network(cmd.tenant_id)
    if standing is not None:
        if standing.net != cmd.net:
            raise Conflict(f"the tenant's network is {standing.net.ipv4_subnet}")
        return standing
    try:
        tenant = await host.shared.tenant(cmd.tenant_id)
    except NotFound:
        return None
    if tenant.net != cmd.net:
        path = "$.request.TeardownNetwork.net"
        raise Conflict("the net is not the one in tenant.json", path=path)
    return None


def sound(cmd: NetworkRequest, allowed: tuple[str, ...]) -> None:
    try:
        check_net(cmd.net, allowed, f"$.request.{cmd.kind}.net")
    except DecodeError as error:
        raise Invalid(error.message, path=error.path) from error


def refuse_anothers(tenant_id: str, net: TenantNet, host: Host) -> None:
    """A net id belongs to one tenant of this host, and so does an address."""
    subnet = IPv4Network(net.ipv4_subnet)
    for other in host.records.networks():
        if other.tenant_id == tenant_id:
            continue
        if other.net.tenant_net_id == net.tenant_net_id:
            raise Conflict(f"tenant_net_id {net.tenant_net_id} belongs to {other.tenant_id}")
        if IPv4Network(other.net.ipv4_subnet).overlaps(subnet):
            raise Conflict(f"{subnet} overlaps {other.net.ipv4_subnet} of {other.tenant_id}")


async def refuse_in_use(cmd: TeardownNetwork, host: Host) -> None:
    """By the kernel and by the journal: either may know of a TAP that the other does not."""
    taps = set(await host.networks.taps_on(cmd.net.bridge_name))
    holders = [
        str(instance.ref)
        for instance in host.records.instances(cmd.tenant_id)
        if instance.status in HOLDING_A_TAP
    ]
    if taps or holders:
        raise Conflict(
            f"the network is in use by {', '.join(sorted({*taps, *holders}))}",
            detail={"taps": sorted(taps), "instances": holders},
        )


def record_of(cmd: NetworkRequest, status: str, host: Host) -> NetworkRecord:
    return NetworkRecord(
        tenant_id=cmd.tenant_id, net=cmd.net, status=status, since_ms=host.facts.now_ms()
    )
