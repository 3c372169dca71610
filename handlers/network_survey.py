"""Which tenants' networks are not as the journal has them: the reconciler restores these."""

from collections.abc import Sequence

from handlers.interfaces import Host
from handlers.network_names import network_specs, port_specs
from handlers.specs import ExpectedNetwork
from schemas.records import InstanceRecord


async def damaged_tenants(host: Host, *, rules_only: bool) -> tuple[bool, Sequence[str]]:
    """Whether the base rules had to be repaired, and whose networks have to be restored.

    `rules_only` leaves out bridges and TAPs. Costs some listings, and not a question per guest.
    """
    expected = expected_networks(host)
    if not expected:
        return False, ()
    base = await host.networks.prepare()
    return base, await host.networks.damaged(expected, rules_only=rules_only)


def expected_networks(host: Host) -> list[ExpectedNetwork]:
    """The networks that are up, with a pin and a TAP of each instance that has one by now."""
    ports: dict[str, list[InstanceRecord]] = {}
    for instance in host.records.instances():
        if instance.status.holds_tap and instance.vmm is not None:
            ports.setdefault(instance.ref.tenant_id, []).append(instance)
    found: list[ExpectedNetwork] = []
    for record in host.records.networks():
        if record.status != "up":
            continue
        rules, bridge = network_specs(record.tenant_id, record.net)
        specs = [
            port_specs(each, host.settings.vmm.uid_base)
            for each in ports.get(record.tenant_id, ())
            if each.net is not None and each.offset is not None and each.uid_slot is not None
        ]
        found.append(ExpectedNetwork(rules, bridge, tuple(specs)))
    return found
