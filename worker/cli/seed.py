"""`hostd seed`: writes a tenant, a pool and an instance as agentd would.

For trying hostd out and for tests. What is there is kept: a tenant's net and an instance's file
are never rewritten, a pool gets the values that are asked for. All writes are atomic.
"""

import contextlib
import hashlib
import ipaddress
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import click

from schemas import naming
from schemas.requests import InstanceRef, TenantNet
from worker.cli.commands import instance_arguments
from worker.cli.context import CliError, config_option, json_option, print_json, settings_of

NET_IDS: Final = (1, 4095)
_QUOTAS: Final = {
    "max_vcpus": 64,
    "max_mem_mib": 65_536,
    "max_running": 64,
    "max_warm": 4,
    "max_pools": 4,
    "max_instances_per_pool": 252,
    "max_disk_gib": 100,
}


@dataclass(frozen=True, slots=True)
class Seed:
    """What to write. `artifacts` maps `vmlinux`, `rootfs.ext4`, `initrd` to files to copy."""

    ref: InstanceRef
    net_id: int
    artifacts: dict[str, str] = field(default_factory=dict[str, str])
    vcpus: int = 1
    mem_mib: int = 128
    data_disk_mib: int = 0
    tags: dict[str, str] = field(default_factory=dict[str, str])
    secrets: bytes | None = None
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Seeded:
    """What is there now. `revision` is None as long as the pool has no artifacts."""

    net: TenantNet
    guest_ip: str
    tap: str
    revision: str | None


def net_of(net_id: int) -> TenantNet:
    """The subnet that agentd's formula gives: `10.(240 + id >> 8).(id & 255).0/24`."""
    base = f"10.{240 + (net_id >> 8)}.{net_id & 255}"
    return TenantNet(net_id, f"{base}.0/24", f"{base}.1", naming.bridge_name(net_id))


def write_seed(data_root: str, seed: Seed) -> Seeded:
    """Write what is missing below `data_root`.

    Raises:
        CliError: `invalid` ids; `conflict` with what is there; `exhausted` addresses.
    """
    for value in (seed.ref.tenant_id, seed.ref.pool_id, seed.ref.instance_id):
        if not naming.ID_PATTERN.fullmatch(value):
            raise CliError("invalid", f"{value!r} is no id: 1 to 63 of a-z 0-9 and inner -")
    if not NET_IDS[0] <= seed.net_id <= NET_IDS[1]:
        raise CliError("invalid", f"net id {seed.net_id} is not in {NET_IDS[0]}..{NET_IDS[1]}")
    tenant = os.path.join(data_root, "tenants", seed.ref.tenant_id)
    pool = os.path.join(tenant, "pools", seed.ref.pool_id)
    net = _write_tenant(tenant, seed)
    if seed.secrets is not None:
        write_atomic(os.path.join(tenant, "secrets.json"), seed.secrets, mode=0o600)
    _write_pool(pool, seed)
    revision = _write_artifacts(os.path.join(pool, "artifacts"), seed.artifacts)
    instance = _write_instance(tenant, pool, seed, net)
    return Seeded(net, instance["guest_ip"], instance["tap_dev"], revision)


def _write_tenant(directory: str, seed: Seed) -> TenantNet:
    path = os.path.join(directory, "tenant.json")
    wanted = net_of(seed.net_id)
    if (there := _read(path)) is not None:
        if there.get("net", {}).get("tenant_net_id") != seed.net_id:
            raise CliError("conflict", f"{path}: has another net: {there.get('net')}")
        return TenantNet(**there["net"])
    _write_json(
        path,
        {
            "tenant_id": seed.ref.tenant_id,
            "quotas": _QUOTAS,
            "net": {name: getattr(wanted, name) for name in wanted.__struct_fields__},
            "secrets_epoch": 0,
            "config_version": 1,
            "pinned": False,
            "audit_retention_days": 0,
            "created_at": _now(),
        },
    )
    return wanted


def _write_pool(directory: str, seed: Seed) -> None:
    path = os.path.join(directory, "pool.json")
    spec = _read(path) or {
        "pool_id": seed.ref.pool_id,
        "tenant_id": seed.ref.tenant_id,
        "flake_ref": "",
        "profile": "minimal",
        "role": "worker",
        "desired_counts": {"running": 0, "warm": 0, "sleeping": 0},
        "runtime_policy": {},
        "metadata": {},
    }
    spec["instance_resources"] = {
        "vcpus": seed.vcpus,
        "mem_mib": seed.mem_mib,
        "data_disk_mib": seed.data_disk_mib,
    }
    metadata = spec.setdefault("metadata", {})
    metadata["tags"] = {**metadata.get("tags", {}), **seed.tags}
    _write_json(path, spec)


def _write_artifacts(directory: str, artifacts: dict[str, str]) -> str | None:
    """Copy into `revisions/<hash of the content>` and point `current` at it."""
    current = os.path.join(directory, "current")
    if not artifacts:
        there = os.readlink(current) if os.path.islink(current) else None
        return there.removeprefix("revisions/") if there else None
    revision = _hash(artifacts)
    revisions = os.path.join(directory, "revisions")
    os.makedirs(revisions, exist_ok=True)
    target = os.path.join(revisions, revision)
    if not os.path.isdir(target):
        half = tempfile.mkdtemp(prefix=".new-", dir=revisions)
        try:
            os.chmod(half, 0o755)  # noqa: S103 # hostd and agentd are different users
            for name, source in artifacts.items():
                shutil.copyfile(source, os.path.join(half, name))
            os.rename(half, target)
        except OSError:
            shutil.rmtree(half, ignore_errors=True)
            raise
    link = f"{current}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(link)
    os.symlink(f"revisions/{revision}", link)
    os.rename(link, current)
    return revision


def _hash(artifacts: dict[str, str]) -> str:
    whole = hashlib.sha256()
    for name, source in sorted(artifacts.items()):
        try:
            with open(source, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CliError("not_found", f"{source}: {error.strerror}") from error
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()[:32]


def _write_instance(tenant: str, pool: str, seed: Seed, net: TenantNet) -> dict[str, Any]:
    directory = os.path.join(pool, "instances", seed.ref.instance_id)
    os.makedirs(os.path.join(directory, "volumes"), exist_ok=True)
    path = os.path.join(directory, "instance.json")
    if (there := _read(path)) is not None:
        return dict(there["net"])
    offset = seed.offset or _free_offset(tenant, net)
    instance_net = {
        "tap_dev": naming.tap_name(net.tenant_net_id, offset),
        "mac": naming.mac_address(net.tenant_net_id, offset),
        "guest_ip": naming.guest_ip(net, offset),
        "gateway_ip": net.gateway_ip,
        "cidr": naming.prefix_len(net),
    }
    _write_json(
        path,
        {
            "instance_id": seed.ref.instance_id,
            "pool_id": seed.ref.pool_id,
            "tenant_id": seed.ref.tenant_id,
            "status": "created",
            "net": instance_net,
            "role": "worker",
            "revision_hash": None,
            "firecracker_pid": None,
            "last_started_at": None,
            "last_stopped_at": None,
            "idle_metrics": {"idle_secs": 0, "cpu_pct": 0.0, "net_bytes": 0, "last_updated": None},
            "entered_running_at": None,
            "entered_warm_at": None,
        },
    )
    return instance_net


def _free_offset(tenant: str, net: TenantNet) -> int:
    """The first offset that no instance of the tenant has, as agentd takes it."""
    base = ipaddress.IPv4Network(net.ipv4_subnet).network_address
    taken: set[int] = set()
    pools = os.path.join(tenant, "pools")
    for pool in os.listdir(pools):
        instances = os.path.join(pools, pool, "instances")
        for instance in os.listdir(instances) if os.path.isdir(instances) else ():
            there = _read(os.path.join(instances, instance, "instance.json"))
            if there is not None:
                taken.add(int(ipaddress.IPv4Address(there["net"]["guest_ip"])) - int(base))
    for offset in range(naming.OFFSET_MIN, naming.OFFSET_MAX + 1):
        if offset not in taken:
            return offset
    raise CliError("exhausted", f"{tenant}: no address is left in {net.ipv4_subnet}")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CliError("invalid", f"{path}: {error}") from error


def _write_json(path: str, value: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(value, indent=2).encode() + b"\n", mode=0o644)


def write_atomic(path: str, content: bytes, *, mode: int) -> None:
    """Replace the file in one step, on disk before it shows."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    descriptor, half = tempfile.mkstemp(prefix=".new-", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.rename(half, path)
    except OSError:
        os.unlink(half)
        raise


def _tags(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> object:
    pairs = [value.partition("=") for value in values]
    if bad := [name for name, equals, _ in pairs if not equals or not name]:
        raise click.BadParameter(f"{bad[0]!r} is not name=value")
    return {name: value for name, _, value in pairs}


_FILE = click.Path(exists=True, dir_okay=False)


@click.command()
@instance_arguments
@click.option("--net-id", type=click.IntRange(*NET_IDS), required=True, help="Tenant net id.")
@click.option("--vmlinux", type=_FILE, help="Kernel; with --rootfs makes a new revision current.")
@click.option("--rootfs", type=_FILE)
@click.option("--initrd", type=_FILE)
@click.option("--vcpus", type=click.IntRange(1, 32), default=1, show_default=True)
@click.option("--mem-mib", type=click.IntRange(1), default=128, show_default=True)
@click.option("--data-disk-mib", type=click.IntRange(0), default=0, show_default=True)
@click.option("--tag", "tags", multiple=True, callback=_tags, metavar="K=V", help="Of the pool.")
@click.option("--secrets", type=click.File("rb"), help="Becomes the tenant's secrets.json.")
@click.option("--offset", type=click.IntRange(naming.OFFSET_MIN, naming.OFFSET_MAX))
@config_option
@json_option
def seed(
    *,
    tenant_id: str,
    pool_id: str,
    instance_id: str,
    net_id: int,
    vmlinux: str | None,
    rootfs: str | None,
    initrd: str | None,
    secrets: Any,
    config: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Write a tenant, pool and instance as agentd would; what is there is kept."""
    if (vmlinux is None) != (rootfs is None) or (initrd and not vmlinux):
        raise click.UsageError("--vmlinux and --rootfs go together, --initrd only with them")
    files = {"vmlinux": vmlinux, "rootfs.ext4": rootfs, "initrd": initrd}
    ref = InstanceRef(tenant_id, pool_id, instance_id)
    root = settings_of(config).paths.data
    seeded = write_seed(
        root,
        Seed(
            ref,
            net_id,
            artifacts={name: path for name, path in files.items() if path is not None},
            secrets=secrets.read() if secrets is not None else None,
            **values,
        ),
    )
    if as_json:
        print_json({"guest_ip": seeded.guest_ip, "tap": seeded.tap, "revision": seeded.revision})
    else:
        click.echo(f"{ref}: {seeded.guest_ip} on {seeded.net.bridge_name}, below {root}")
        click.echo(f"revision {seeded.revision or 'none: give --vmlinux and --rootfs'}")
