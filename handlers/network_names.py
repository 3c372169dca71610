"""Names and specs of a tenant's network and of an instance's port in it, and who else has them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from handlers.errors import Conflict
from handlers.interfaces import Records
from handlers.specs import BridgeSpec, PinSpec, TapSpec, TenantRulesSpec
from schemas import naming
from schemas.naming import subnet_of
from schemas.records import InstanceRecord, NetworkRecord
from schemas.requests import InstanceRef, TenantNet

PORTS_KNOWN: Final = 4096
"""Each pass of the reconciler asks for the specs of all ports."""


def network_specs(tenant_id: str, net: TenantNet) -> tuple[TenantRulesSpec, BridgeSpec]:
    """In the order of creation: the rules are in force before there is a bridge to forward."""
    return TenantRulesSpec(tenant_id, net), BridgeSpec(tenant_id, net)


@dataclass(frozen=True, slots=True)
class Names:
    """Network names of an instance, derived from its tenant's net and its address offset."""

    net: TenantNet
    offset: int

    @property
    def tap(self) -> str:
        return naming.tap_name(self.net.tenant_net_id, self.offset)

    @property
    def mac(self) -> str:
        return naming.mac_address(self.net.tenant_net_id, self.offset)

    @property
    def guest_ip(self) -> str:
        return naming.guest_ip(self.net, self.offset)

    @property
    def pin(self) -> PinSpec:
        return PinSpec(tap=self.tap, mac=self.mac, guest_ip=self.guest_ip)

    def tap_spec(self, ref: InstanceRef, owner_uid: int) -> TapSpec:
        """The TAP of this instance, for the uid of its jail."""
        return TapSpec(
            name=self.tap,
            bridge=naming.bridge_name(self.net.tenant_net_id),
            owner_uid=owner_uid,
            mac=self.mac,
            guest_ip=self.guest_ip,
            alias=naming.interface_alias(str(ref)),
        )


def names_of(record: InstanceRecord) -> Names | None:
    """None if the instance was never launched."""
    if record.net is None or record.offset is None:
        return None
    return Names(record.net, record.offset)


def other_holder(tenant_id: str, net: TenantNet, records: Records) -> NetworkRecord | None:
    """Another tenant's network that has the net id, or an address, of this one."""
    same_id = records.network_with_id(net.tenant_net_id)
    overlapping = records.networks_overlapping(subnet_of(net.ipv4_subnet))
    others = (each for each in (same_id, *overlapping) if each is not None)
    return next((each for each in others if each.tenant_id != tenant_id), None)


def port_specs(record: InstanceRecord, uid_base: int) -> tuple[PinSpec, TapSpec]:
    """An instance's pin and TAP, in the order of creation.

    Raises:
        Conflict: the record has no network, offset or uid: the instance has no TAP.
    """
    names = names_of(record)
    if names is None or record.uid_slot is None:
        raise Conflict(f"instance {record.ref} has no network port in the journal")
    return _port(names, record.ref, uid_base + record.uid_slot)


@lru_cache(maxsize=PORTS_KNOWN)
def _port(names: Names, ref: InstanceRef, uid: int) -> tuple[PinSpec, TapSpec]:
    return names.pin, names.tap_spec(ref, uid)
