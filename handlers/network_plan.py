"""What a tenant's network and an instance's place in it consist of. Pure."""

from handlers.errors import Conflict
from handlers.specs import BridgeSpec, PinSpec, TapSpec, TenantRulesSpec
from schemas import naming
from schemas.records import InstanceRecord, Status
from schemas.requests import TenantNet

# An instance in one of these may have a TAP; sleepers and the stopped hold none.
HOLDING_A_TAP = frozenset(
    {
        Status.RUNNING,
        Status.WARM,
        Status.STARTING,
        Status.STOPPING,
        Status.DRAINING,
        Status.SNAPSHOTTING,
        Status.WAKING,
        Status.DESTROYING,
        Status.UNKNOWN,
    }
)


def network_specs(tenant_id: str, net: TenantNet) -> tuple[TenantRulesSpec, BridgeSpec]:
    """In the order of making: the rules stand before there is a link they could fail to hold."""
    return TenantRulesSpec(tenant_id, net), BridgeSpec(tenant_id, net)


def port_specs(record: InstanceRecord, uid_base: int) -> tuple[PinSpec, TapSpec]:
    """An instance's pin and TAP, in the order of making.

    Raises:
        Conflict: the record has no network, offset or uid: the instance holds no TAP.
    """
    if record.net is None or record.offset is None or record.uid_slot is None:
        raise Conflict(f"{record.ref} has no place in a network")
    net_id = record.net.tenant_net_id
    tap = naming.tap_name(net_id, record.offset)
    mac = naming.mac_address(net_id, record.offset)
    address = naming.guest_ip(record.net, record.offset)
    return PinSpec(tap, mac, address), TapSpec(
        name=tap,
        bridge=naming.bridge_name(net_id),
        owner_uid=uid_base + record.uid_slot,
        mac=mac,
        guest_ip=address,
        alias=f"hostd:{record.ref}",
    )
