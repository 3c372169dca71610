"""The JSON files shared with agentd: fields, types and defaults as the contract fixes them.

An unprivileged process writes them, so nothing in them is trusted: each is read under a size limit,
checked for types, ranges and rules, and must have the IDs of its directories. Unknown fields are
allowed, and kept when hostd rewrites a file; a missing optional field has its default. No I/O here:
the caller passes the bytes, and the file name for messages.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from schemas import naming
from schemas.decode_error import DecodeError, quoted
from schemas.requests import InstanceRef, TenantNet
from schemas.tenant_net import address_of, check_net
from schemas.unpack import FILE, convert, read_json

PORT_PATTERN = re.compile(r"[1-9][0-9]{0,4}")
U8 = Annotated[int, msgspec.Meta(ge=0, le=2**8 - 1)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # at most U64_MAX: msgspec cannot say so
U64_MAX = 2**64 - 1
U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # an i64 of the journal or of a reader
Seconds = Annotated[int, msgspec.Meta(ge=0, le=86_400)]  # of a wait
MemMib = Annotated[int, msgspec.Meta(ge=1, le=2**24)]  # 16 TiB, beyond any host
DiskMib = Annotated[int, msgspec.Meta(ge=0, le=2**24 - 1)]  # ext4 of 4 KiB blocks: below 16 TiB
Vcpus = Annotated[int, msgspec.Meta(ge=1, le=32)]  # Firecracker's own limit
FileT = TypeVar("FileT", bound="TenantConfig | PoolSpec | InstanceFile")


class TenantQuota(msgspec.Struct, frozen=True):
    max_vcpus: U32
    max_mem_mib: U64
    max_running: U32
    max_warm: U32
    max_pools: U32
    max_instances_per_pool: U32
    max_disk_gib: U64


class TenantConfig(msgspec.Struct, frozen=True):
    """`tenant.json`."""

    tenant_id: str
    quotas: TenantQuota
    net: TenantNet
    secrets_epoch: U63 = 0
    config_version: U63 = 1
    pinned: bool = False
    audit_retention_days: U32 = 0
    created_at: str = ""


class InstanceResources(msgspec.Struct, frozen=True):
    vcpus: Vcpus
    mem_mib: MemMib
    data_disk_mib: DiskMib = 0


class RuntimePolicy(msgspec.Struct, frozen=True):
    """All in seconds."""

    min_running_seconds: U32 = 60
    min_warm_seconds: U32 = 30
    drain_timeout_seconds: Seconds = 30
    graceful_shutdown_seconds: Seconds = 15


class PoolMetadata(msgspec.Struct, frozen=True):
    capability: str | None = None
    integration_types: tuple[str, ...] = ()
    tags: dict[str, str] = {}


class PoolSpec(msgspec.Struct, frozen=True):
    """`pool.json`, as far as hostd reads it. `metadata.tags`: `hostd.ready`, `hostd.agent_port`."""

    pool_id: str
    tenant_id: str
    instance_resources: InstanceResources
    runtime_policy: RuntimePolicy = RuntimePolicy()
    metadata: PoolMetadata = PoolMetadata()
    seccomp_policy: Literal["baseline", "strict"] = "baseline"

    @property
    def ready(self) -> str:
        """`agent` or `api`: the proof that a started instance is ready."""
        return self.metadata.tags.get("hostd.ready", "agent")

    @property
    def agent_port(self) -> int:
        return int(self.metadata.tags.get("hostd.agent_port", "5252"))

    @property
    def serial(self) -> bool:
        """Whether each launch has a serial console file."""
        return self.metadata.tags.get("hostd.serial", "false") == "true"


class InstanceNet(msgspec.Struct, frozen=True):
    tap_dev: str
    mac: str
    guest_ip: str
    gateway_ip: str
    cidr: U8


class InstanceFile(msgspec.Struct, frozen=True):
    """`instance.json`, as far as hostd reads it. `extra` has the other fields, agentd's."""

    instance_id: str
    pool_id: str
    tenant_id: str
    status: Literal["created", "ready", "running", "warm", "sleeping", "stopped"]
    net: InstanceNet
    revision_hash: str | None = None
    firecracker_pid: U32 | None = None
    entered_running_at: str | None = None
    extra: dict[str, Any] = {}


def parse_tenant(data: bytes, file: str, tenant_id: str) -> TenantConfig:
    """`tenant.json` of the directory `tenant_id`. Everything is checked except that its net lies in
    an allowed range.

    Raises:
        DecodeError: the path names `file` and the field, e.g. `tenant.json: $.quotas.max_vcpus`.
    """
    tenant = _parse(data, file, TenantConfig, {"tenant_id": tenant_id})
    for name in ("max_mem_mib", "max_disk_gib"):
        if getattr(tenant.quotas, name) > U64_MAX:
            raise DecodeError(f"{file}: $.quotas.{name}", f"Expected `int` <= {U64_MAX}")
    check_net(tenant.net, ("0.0.0.0/0",), f"{file}: $.net")
    return tenant


def parse_pool(data: bytes, file: str, tenant_id: str, pool_id: str) -> PoolSpec:
    """`pool.json` of these directories, with the `hostd.*` tags checked.

    Raises:
        DecodeError: the path names `file` and the field, e.g. `pool.json: $.metadata.tags`.
    """
    pool = _parse(data, file, PoolSpec, {"tenant_id": tenant_id, "pool_id": pool_id})
    tags = pool.metadata.tags
    _check_tag(file, tags, "hostd.ready", lambda value: value in ("agent", "api"), "agent or api")
    _check_tag(
        file, tags, "hostd.serial", lambda value: value in ("true", "false"), "true or false"
    )
    _check_tag(file, tags, "hostd.agent_port", _is_port, "a port, 1 to 65535")
    return pool


def parse_instance(data: bytes, file: str, ref: InstanceRef) -> InstanceFile:
    """`instance.json` of the directories of `ref`, with unknown fields in `extra`. Its addresses
    are checked by `check_instance_net`.

    Raises:
        DecodeError: the path names `file` and the field, e.g. `instance.json: $.status`.
    """
    ids = {"tenant_id": ref.tenant_id, "pool_id": ref.pool_id, "instance_id": ref.instance_id}
    instance = _parse(data, file, InstanceFile, ids)
    revision = instance.revision_hash
    if revision is not None and not naming.REVISION_PATTERN.fullmatch(revision):
        raise DecodeError(
            f"{file}: $.revision_hash", f"got {quoted(revision)}, want [0-9a-z]{{1,64}}"
        )
    return instance


def offset_of(guest_ip: str, net: TenantNet, path: str = "instance.json: $.net.guest_ip") -> int:
    """The offset of a guest's address in a checked net: 3 to 254, whatever the prefix length.

    Raises:
        DecodeError: not an IPv4 address, outside the subnet, out of range, broadcast or gateway.
    """
    address = address_of(guest_ip, path)
    subnet = naming.subnet_of(net.ipv4_subnet)
    if address not in subnet:
        raise DecodeError(path, f"got {address}, want an address in {subnet}")
    offset = int(address) - int(subnet.network_address)
    if not naming.OFFSET_MIN <= offset <= naming.OFFSET_MAX:
        raise DecodeError(
            path,
            f"got {address}, offset {offset} in {subnet}, want offset {naming.OFFSET_MIN} to "
            f"{naming.OFFSET_MAX}",
        )
    if address == subnet.broadcast_address or str(address) == net.gateway_ip:
        raise DecodeError(path, f"got {address}, the broadcast or gateway address of {subnet}")
    return offset


def check_instance_net(
    instance: InstanceFile, net: TenantNet, offset: int, file: str = "instance.json"
) -> None:
    """Check that the instance's network is the one derived from the tenant's.

    Raises:
        DecodeError: a value differs; the derived one is in the message.
    """
    derived = InstanceNet(
        tap_dev=naming.tap_name(net.tenant_net_id, offset),
        mac=naming.mac_address(net.tenant_net_id, offset),
        guest_ip=naming.guest_ip(net, offset),
        gateway_ip=net.gateway_ip,
        cidr=naming.prefix_len(net),
    )
    for name in InstanceNet.__struct_fields__:
        own, due = getattr(instance.net, name), getattr(derived, name)
        if own != due:
            raise DecodeError(f"{file}: $.net.{name}", f"got {quoted(str(own))}, want {due}")


def _parse(data: bytes, file: str, kind: type[FileT], ids: Mapping[str, str]) -> FileT:
    try:
        raw = read_json(data, FILE)
        if kind is InstanceFile:
            known = set(InstanceFile.__struct_fields__) - {"extra"}
            extra = {name: value for name, value in raw.items() if name not in known}
            raw = {name: value for name, value in raw.items() if name in known}
            raw["extra"] = extra
        parsed = convert(raw, kind)
    except DecodeError as error:
        raise DecodeError(f"{file}: {error.path}", error.message) from error
    for name, due in ids.items():
        own = getattr(parsed, name)
        if own != due:
            raise DecodeError(f"{file}: $.{name}", f"got {quoted(own)}, want {due}, its directory")
    return parsed


def _is_port(value: str) -> bool:
    return PORT_PATTERN.fullmatch(value) is not None and int(value) <= 65_535


def _check_tag(
    file: str, tags: Mapping[str, str], tag: str, is_valid: Callable[[str], bool], want: str
) -> None:
    if tag in tags and not is_valid(tags[tag]):
        path = f"{file}: $.metadata.tags['{tag}']"
        raise DecodeError(path, f"got {quoted(tags[tag])}, want {want}")
