"""The JSON files shared with agentd: fields, types and defaults as the contract fixes them.

Unknown fields are allowed and kept by whoever rewrites a file; a missing optional field reads as
its default. Parsing and its errors are in `schemas/codec.py`; no I/O here.
"""

from typing import Any

import msgspec

from schemas.requests import TenantNet


class TenantQuota(msgspec.Struct, frozen=True):
    max_vcpus: int
    max_mem_mib: int
    max_running: int
    max_warm: int
    max_pools: int
    max_instances_per_pool: int
    max_disk_gib: int


class TenantConfig(msgspec.Struct, frozen=True):
    """`tenant.json`."""

    tenant_id: str
    quotas: TenantQuota
    net: TenantNet
    secrets_epoch: int = 0
    config_version: int = 1
    pinned: bool = False
    audit_retention_days: int = 0
    created_at: str = ""


class InstanceResources(msgspec.Struct, frozen=True):
    vcpus: int
    mem_mib: int
    data_disk_mib: int = 0


class RuntimePolicy(msgspec.Struct, frozen=True):
    """All in seconds."""

    min_running_seconds: int = 60
    min_warm_seconds: int = 30
    drain_timeout_seconds: int = 30
    graceful_shutdown_seconds: int = 15


class PoolMetadata(msgspec.Struct, frozen=True):
    capability: str | None = None
    integration_types: tuple[str, ...] = ()
    tags: dict[str, str] = {}


class PoolSpec(msgspec.Struct, frozen=True):
    """`pool.json`; only what hostd reads. `metadata.tags`: `hostd.ready`, `hostd.agent_port`."""

    pool_id: str
    tenant_id: str
    instance_resources: InstanceResources
    runtime_policy: RuntimePolicy = RuntimePolicy()
    metadata: PoolMetadata = PoolMetadata()
    seccomp_policy: str = "baseline"

    @property
    def ready(self) -> str:
        """`agent` or `api`: what proves that a started instance is ready."""
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
    cidr: int


class InstanceFile(msgspec.Struct, frozen=True):
    """`instance.json`; only what hostd reads. Everything else in the file is agentd's."""

    instance_id: str
    pool_id: str
    tenant_id: str
    status: str
    net: InstanceNet
    revision_hash: str | None = None
    firecracker_pid: int | None = None
    entered_running_at: str | None = None
    extra: dict[str, Any] = {}
