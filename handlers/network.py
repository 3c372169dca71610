"""SetupNetwork, TeardownNetwork and the repair of a network.

The journal holds the desired state of each tenant's network: once set up, a network is kept in
effect until its teardown, by drift repair and after a reboot through the same mechanisms.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from handlers.admission.disk_admission import refuse_low_disk
from handlers.cancellation import together
from handlers.concurrency import limited
from handlers.errors import Conflict, Invalid, NotFound
from handlers.interfaces import Host
from handlers.network_names import network_specs, other_holder, port_specs
from handlers.specs import BridgeSpec, Restored, TenantRulesSpec
from handlers.steps import Done, Steps
from schemas.decode_error import DecodeError
from schemas.envelopes import EventKind
from schemas.files import TenantConfig
from schemas.records import ABSENT, NetworkRecord
from schemas.requests import NetworkRequest, SetupNetwork, TeardownNetwork, TenantNet
from schemas.tenant_net import check_net_of


async def setup_network(cmd: SetupNetwork, steps: Steps, host: Host) -> Done:
    """Put a tenant's network in effect: rules first, then the bridge, both read back.

    Idempotent: what matches is left unchanged, a partly made network is completed. On failure
    everything that this command made, in any of its runs, is removed. What other programs' rules
    or the kernel's settings keep from the guests is in `detail.warnings` and an event.

    Raises:
        Invalid: the net is malformed or outside `[network] allowed`.
        NotFound: the tenant has no `tenant.json`.
        Conflict: `tenant.json` or the journal has another net; net id or subnet belong to another
            tenant; a route of the host overlaps; an interface of another owner has the bridge's
            name.
        Exhausted: the host's disk is full.
        HostFault: the kernel's read-back differs from what was set.
    """
    refuse_low_disk(host)
    async with network_lock(cmd.tenant_id, steps, host):
        validate_net(cmd, host.settings.network.allowed)
        rules, bridge = network_specs(cmd.tenant_id, cmd.net)
        planned = (host.tenant_rules, rules.key), (host.bridges, bridge.key)
        recorded, _ = await together(validate_setup(cmd, host), steps.look(*planned))
        _, changed = await together(
            steps.announce(*planned), steps.act("prepare_network", host.networks.prepare)
        )
        changed = await steps.ensure(host.tenant_rules, rules) or changed
        made, found = await together(
            steps.ensure(host.bridges, bridge),
            host.networks.warnings(host.records.network_count() + (recorded is None)),
        )
        changed, warnings = made or changed, list(found)
        detail: dict[str, object] = {"bridge_name": cmd.net.bridge_name}
        if warnings:
            detail["warnings"] = warnings
            await host.records.event(
                EventKind.NETWORK,
                tenant_id=cmd.tenant_id,
                reason="set up, but guests may not work",
                detail={"warnings": warnings},
                command_id=steps.command_id,
            )
        record = None
        if recorded is None or recorded.status != "up":
            record = record_of(cmd, "up", host)
            host.records.expect_network(record)  # last: nothing after it can fail
            changed = True
    # `changed` covers all runs of the command: a step that an earlier run made has outcome `done`.
    ours = {host.tenant_rules.name, host.bridges.name}
    changed = changed or any(s.outcome == "done" and s.name in ours for s in steps.taken)
    return Done(changed=changed, status=None, detail=detail, network=record)


async def teardown_network(cmd: TeardownNetwork, steps: Steps, host: Host) -> Done:
    """Remove the tenant's bridge, rules and conntrack entries. Completed, never undone.

    Raises:
        Invalid: the net is malformed.
        Conflict: an instance holds a TAP, or the net is not the tenant's.
    """
    async with network_lock(cmd.tenant_id, steps, host):
        recorded = await validate_teardown(cmd, host)
        rules, bridge = network_specs(cmd.tenant_id, cmd.net)
        await refuse_in_use(cmd, host)
        changed = recorded is not None or await exists(rules, bridge, host)
        steps.finalize()
        # The bridge is removed first: without its rules it must not forward anything. A worker that
        # is killed before the record is on disk leaves this command, which the next one completes.
        await together(
            note_teardown(cmd, recorded, host),
            steps.remove(host.bridges, bridge.key),
        )
        await steps.remove(host.tenant_rules, rules.key)
    record = None if recorded is None else record_of(cmd, ABSENT, host)
    return Done(
        changed=changed,
        status=None,
        detail={"bridge_name": cmd.net.bridge_name},
        network=record,
    )


async def exists(rules: TenantRulesSpec, bridge: BridgeSpec, host: Host) -> bool:
    """Whether any of a network is on the host."""
    return any(await together(host.bridges.exists(bridge.key), host.tenant_rules.exists(rules.key)))


async def note_teardown(cmd: TeardownNetwork, recorded: NetworkRecord | None, host: Host) -> None:
    """From here on nothing repairs the network, also if the teardown fails."""
    if recorded is not None and recorded.status == "up":
        await host.records.put_network(record_of(cmd, "down", host))


@asynccontextmanager
async def network_lock(tenant_id: str, steps: Steps, host: Host) -> AsyncGenerator[None]:
    """Exclusive: the tenant's network, and the allocation of net ids and subnets to tenants."""
    async with (
        limited(host.slots.networks, tenant_id, "wait_network_slot", steps),
        host.locks.exclusive(tenant_id, steps.control),
        host.locks.subnets(steps.control),
    ):
        yield


async def restore_network(record: NetworkRecord, host: Host) -> Restored:
    """Repair a network that should be up, with the pins and TAPs of its live instances.

    For recovery and drift repair. Changes nothing, and reports nothing, if all is in effect. A
    missing TAP is not made again: the VMM could not reopen it.

    Raises:
        Conflict, HostFault: as SetupNetwork; what precedes the failed step is repaired.
    """
    repaired: list[str] = []
    lost: list[str] = []
    async with host.locks.exclusive(record.tenant_id):
        if host.records.network(record.tenant_id) != record or record.status != "up":
            return Restored()
        rules, bridge = network_specs(record.tenant_id, record.net)
        if await host.networks.prepare():
            repaired.append("base_rules")
        if await host.tenant_rules.ensure(rules):
            repaired.append(f"{host.tenant_rules.name} {rules.key}")
        if await host.bridges.ensure(bridge):
            repaired.append(f"{host.bridges.name} {bridge.key}")
        for instance in host.records.instances(record.tenant_id):
            if not instance.status.holds_tap or instance.vmm is None:
                continue
            pin, tap = port_specs(instance, host.settings.vmm.uid_base)
            if not await host.taps.exists(tap.key):
                # Without a VMM the instance is being released: the TAP first, then the pin.
                if await host.vmms.exists(instance.jail_id):
                    lost.append(f"{host.taps.name} {tap.key}")
                continue
            if await host.pins.ensure(pin):
                repaired.append(f"{host.pins.name} {pin.key}")
            if await host.taps.ensure(tap):
                repaired.append(f"{host.taps.name} {tap.key}")
    return Restored(tuple(repaired), tuple(lost))


async def validate_setup(cmd: SetupNetwork, host: Host) -> NetworkRecord | None:
    """The tenant's network in the journal, if any; raises if the net cannot be set up."""
    tenant, route = await together(
        host.shared.tenant(cmd.tenant_id),
        host.networks.overlapping_route(cmd.net.ipv4_subnet, except_bridge=cmd.net.bridge_name),
    )
    if tenant.net != cmd.net:
        raise net_differs(cmd, tenant)
    refuse_duplicate(cmd.tenant_id, cmd.net, host)
    recorded = host.records.network(cmd.tenant_id)
    if recorded is not None and recorded.net != cmd.net:
        raise Conflict(
            f"network of tenant {cmd.tenant_id} is up with subnet {recorded.net.ipv4_subnet}, "
            f"the command has {cmd.net.ipv4_subnet}: send TeardownNetwork first"
        )
    if route is not None:
        raise Conflict(
            f"subnet {cmd.net.ipv4_subnet} overlaps route {route} of the host; if this is "
            "intended, add the route to [network] exempt_routes"
        )
    return recorded


async def validate_teardown(cmd: TeardownNetwork, host: Host) -> NetworkRecord | None:
    """The network in the journal, if any. `tenant.json` is read only if there is none: it may have
    been changed or removed since the setup, and the teardown must still be possible."""
    validate_net(cmd, host.settings.network.allowed)
    refuse_duplicate(cmd.tenant_id, cmd.net, host)
    recorded = host.records.network(cmd.tenant_id)
    if recorded is not None:
        if recorded.net != cmd.net:
            raise Conflict(
                f"network of tenant {cmd.tenant_id} has subnet {recorded.net.ipv4_subnet}, "
                f"the command has {cmd.net.ipv4_subnet}"
            )
        return recorded
    try:
        tenant = await host.shared.tenant(cmd.tenant_id)
    except NotFound:
        return None
    if tenant.net != cmd.net:
        raise net_differs(cmd, tenant)
    return None


def net_differs(cmd: NetworkRequest, tenant: TenantConfig) -> Conflict:
    return Conflict(
        f"net of the command differs from tenant.json: got {cmd.net.ipv4_subnet} "
        f"({cmd.net.bridge_name}), want {tenant.net.ipv4_subnet} ({tenant.net.bridge_name})",
        path=f"$.request.{cmd.kind}.net",
    )


def validate_net(cmd: NetworkRequest, allowed: tuple[str, ...]) -> None:
    try:
        check_net_of(cmd, allowed)
    except DecodeError as error:
        raise Invalid(error.message, path=error.path) from error


def refuse_duplicate(tenant_id: str, net: TenantNet, host: Host) -> None:
    """A net id belongs to one tenant of this host, and so does an address."""
    other = other_holder(tenant_id, net, host.records)
    if other is None:
        return
    if other.net.tenant_net_id == net.tenant_net_id:
        raise Conflict(f"tenant_net_id {net.tenant_net_id} belongs to tenant {other.tenant_id}")
    raise Conflict(
        f"subnet {net.ipv4_subnet} overlaps {other.net.ipv4_subnet} of tenant {other.tenant_id}"
    )


async def refuse_in_use(cmd: TeardownNetwork, host: Host) -> None:
    """Checks kernel and journal: either may have a TAP that the other does not."""
    # A Stop or Sleep just before may have left TAPs for the kernel to delete.
    await host.taps.settle(cmd.net.tenant_net_id)
    taps = set(await host.networks.taps_on(cmd.net.bridge_name))
    holders = [
        str(instance.ref)
        for instance in host.records.instances(cmd.tenant_id)
        if instance.status.holds_tap
    ]
    if taps or holders:
        raise Conflict(
            f"network of tenant {cmd.tenant_id} is in use by "
            f"{', '.join(sorted({*taps, *holders}))}: stop these instances first",
            detail={"taps": sorted(taps), "instances": holders},
        )


def record_of(cmd: NetworkRequest, status: str, host: Host) -> NetworkRecord:
    return NetworkRecord(
        tenant_id=cmd.tenant_id, net=cmd.net, status=status, since_ms=host.facts.now_ms()
    )
