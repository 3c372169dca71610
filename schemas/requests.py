"""`HostdRequest`, field for field as serde declares it; that order is the compact wire form."""

from typing import Annotated, ClassVar

import msgspec

__all__ = [
    "PROTOCOL_MAX",
    "PROTOCOL_MIN",
    "TENANT_NET_ID_MAX",
    "DestroyInstance",
    "Error",
    "InstanceRef",
    "InstanceRequest",
    "NetworkRequest",
    "Ok",
    "Ping",
    "Pong",
    "Request",
    "Response",
    "SetupNetwork",
    "SleepInstance",
    "StartInstance",
    "StopInstance",
    "TeardownNetwork",
    "TenantNet",
    "TenantNetId",
    "VolumeAttach",
    "WakeInstance",
]

PROTOCOL_MIN = 1
PROTOCOL_MAX = 2
TENANT_NET_ID_MAX = 4095
TenantNetId = Annotated[int, msgspec.Meta(ge=0, le=TENANT_NET_ID_MAX)]


class TenantNet(msgspec.Struct, frozen=True):
    """A tenant's network. `bridge_name` is derived from `tenant_net_id` and only checked."""

    tenant_net_id: TenantNetId
    ipv4_subnet: str
    gateway_ip: str
    bridge_name: str


class VolumeAttach(msgspec.Struct, frozen=True):
    """A workspace volume of protocol 2; a non-empty list is answered `unsupported`."""

    workspace_id: str
    name: str
    mount_path: str
    mode: str


class InstanceRef(msgspec.Struct, frozen=True, order=True):
    """Names one instance: tenant, pool, instance. Printed, and used as a key, as `t/p/i`."""

    tenant_id: str
    pool_id: str
    instance_id: str

    def __str__(self) -> str:
        return f"{self.tenant_id}/{self.pool_id}/{self.instance_id}"


class StartInstance(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "StartInstance"
    tenant_id: str
    pool_id: str
    instance_id: str
    workspace_id: str | None = None
    volumes: tuple[VolumeAttach, ...] = ()

    @property
    def ref(self) -> InstanceRef:
        return InstanceRef(self.tenant_id, self.pool_id, self.instance_id)


class StopInstance(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "StopInstance"
    tenant_id: str
    pool_id: str
    instance_id: str
    workspace_id: str | None = None

    @property
    def ref(self) -> InstanceRef:
        return InstanceRef(self.tenant_id, self.pool_id, self.instance_id)


class SleepInstance(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "SleepInstance"
    tenant_id: str
    pool_id: str
    instance_id: str
    force: bool
    drain_timeout_secs: int | None = None
    workspace_id: str | None = None

    @property
    def ref(self) -> InstanceRef:
        return InstanceRef(self.tenant_id, self.pool_id, self.instance_id)


class WakeInstance(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "WakeInstance"
    tenant_id: str
    pool_id: str
    instance_id: str
    workspace_id: str | None = None

    @property
    def ref(self) -> InstanceRef:
        return InstanceRef(self.tenant_id, self.pool_id, self.instance_id)


class DestroyInstance(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "DestroyInstance"
    tenant_id: str
    pool_id: str
    instance_id: str
    wipe_volumes: bool
    workspace_id: str | None = None

    @property
    def ref(self) -> InstanceRef:
        return InstanceRef(self.tenant_id, self.pool_id, self.instance_id)


class SetupNetwork(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "SetupNetwork"
    tenant_id: str
    net: TenantNet


class TeardownNetwork(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "TeardownNetwork"
    tenant_id: str
    net: TenantNet


class Ping(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "Ping"


InstanceRequest = StartInstance | StopInstance | SleepInstance | WakeInstance | DestroyInstance
NetworkRequest = SetupNetwork | TeardownNetwork
Request = InstanceRequest | NetworkRequest | Ping


class Ok(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "Ok"


class Pong(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "Pong"


class Error(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "Error"
    message: str


Response = Ok | Error | Pong
