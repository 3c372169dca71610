"""A small world of files as agentd leaves them, on a real file system, for the store's tests."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from schemas.requests import InstanceRef

REF = InstanceRef("acme", "web", "i-0a1b2c3d")
REVISION = "0f3kq9"
NET = {
    "tenant_net_id": 7,
    "ipv4_subnet": "10.240.7.0/24",
    "gateway_ip": "10.240.7.1",
    "bridge_name": "br-tenant-7",
}


@dataclass(frozen=True)
class StoreHost:
    """`data` is agentd's root, `state` hostd's own, `jails` the jail base; one file system."""

    top: Path

    @property
    def data(self) -> Path:
        return self.top / "mvm"

    @property
    def state(self) -> Path:
        return self.top / "hostd"

    @property
    def jails(self) -> Path:
        return self.state / "jails"

    @property
    def tenant(self) -> Path:
        return self.data / "tenants" / REF.tenant_id

    @property
    def pool(self) -> Path:
        return self.tenant / "pools" / REF.pool_id

    @property
    def instance(self) -> Path:
        return self.pool / "instances" / REF.instance_id

    @property
    def revision(self) -> Path:
        return self.pool / "artifacts" / "revisions" / REVISION


def write(path: Path, data: bytes | str | dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, dict):
        data = json.dumps(data, indent=2)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def make_world(top: Path) -> StoreHost:
    world = StoreHost(top)
    quotas = dict.fromkeys(
        ("max_vcpus", "max_mem_mib", "max_running", "max_warm", "max_pools"), 16
    ) | {"max_instances_per_pool": 16, "max_disk_gib": 100}
    write(
        world.tenant / "tenant.json",
        {
            "tenant_id": REF.tenant_id,
            "quotas": quotas,
            "net": NET,
            "secrets_epoch": 0,
            "config_version": 1,
            "pinned": False,
            "audit_retention_days": 0,
            "created_at": "2026-01-01T00:00:00Z",
        },
    )
    write(
        world.pool / "pool.json",
        {
            "pool_id": REF.pool_id,
            "tenant_id": REF.tenant_id,
            "instance_resources": {"vcpus": 1, "mem_mib": 128, "data_disk_mib": 8},
        },
    )
    write(
        world.instance / "instance.json",
        {
            "instance_id": REF.instance_id,
            "pool_id": REF.pool_id,
            "tenant_id": REF.tenant_id,
            "status": "created",
            "net": {
                "tap_dev": "tn7i3",
                "mac": "02:fc:00:07:00:03",
                "guest_ip": "10.240.7.3",
                "gateway_ip": "10.240.7.1",
                "cidr": 24,
            },
            "idle_metrics": {"cpu_pct": 0.10},
        },
    )
    write(world.revision / "vmlinux", b"\x7fELF kernel" * 100)
    with write(world.revision / "rootfs.ext4", b"").open("r+b") as rootfs:
        rootfs.truncate(4 << 20)
        rootfs.seek(1 << 20)
        rootfs.write(b"root file system")
    (world.pool / "artifacts" / "current").symlink_to(f"revisions/{REVISION}")
    os.makedirs(world.state, mode=0o700)
    return world


def give_to(world: StoreHost, uid: int) -> None:
    """As on a host: agentd runs as a user of its own and owns everything that it shares."""
    os.lchown(world.data / "tenants", uid, uid)
    for directory, directories, names in os.walk(world.data / "tenants"):
        for name in [*directories, *names]:
            os.lchown(os.path.join(directory, name), uid, uid)
