"""Tenants and guests that the network tests set up.

GuestPlan derives a guest's names on its own, and not by handlers.network_names: a mistake there
would otherwise be in the rules and in what the tests expect of them alike.
"""

from dataclasses import dataclass

from handlers.specs import BridgeSpec, PinSpec, TapSpec, TenantRulesSpec
from schemas import naming
from schemas.requests import TenantNet
from tests.kernel.net.netns import HostNet

OWNER_UID = 2_000_000_007


def net_of(net_id: int) -> TenantNet:
    subnet = f"10.{240 + net_id // 256}.{net_id % 256}"
    return TenantNet(net_id, f"{subnet}.0/24", f"{subnet}.1", naming.bridge_name(net_id))


@dataclass(frozen=True, slots=True)
class GuestPlan:
    """A guest's derived names."""

    tenant_id: str
    net: TenantNet
    offset: int

    @property
    def tap(self) -> str:
        return naming.tap_name(self.net.tenant_net_id, self.offset)

    @property
    def mac(self) -> str:
        return naming.mac_address(self.net.tenant_net_id, self.offset)

    @property
    def ip(self) -> str:
        return naming.guest_ip(self.net, self.offset)

    @property
    def gateway_mac(self) -> str:
        return naming.mac_address(self.net.tenant_net_id, 1)

    @property
    def pin(self) -> PinSpec:
        return PinSpec(self.tap, self.mac, self.ip)

    @property
    def spec(self) -> TapSpec:
        return TapSpec(
            name=self.tap,
            bridge=self.net.bridge_name,
            owner_uid=OWNER_UID,
            mac=self.mac,
            guest_ip=self.ip,
            alias=f"hostd:{self.tenant_id}/pool/i{self.offset}",
        )


async def set_up(net: HostNet, tenant_id: str, tenant_net: TenantNet) -> None:
    await net.mechanisms.networks.prepare()
    await net.mechanisms.tenant_rules.ensure(TenantRulesSpec(tenant_id, tenant_net))
    await net.mechanisms.bridges.ensure(BridgeSpec(tenant_id, tenant_net))


async def plug_in(net: HostNet, plan: GuestPlan) -> None:
    await net.mechanisms.pins.ensure(plan.pin)
    await net.mechanisms.taps.ensure(plan.spec)
