"""`hostd seed`: write the files of a tenant, a pool and an instance in agentd's place.

For trials and tests. Existing tenant and instance files are never rewritten; an existing pool gets
the resources and tags that are given. All writes are atomic.
"""

import contextlib
import hashlib
import ipaddress
import json
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import click
import msgspec

from handlers.host.storage.tenant_writer import TenantWriter
from schemas import naming
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.files import parse_instance, parse_pool, parse_tenant
from schemas.requests import InstanceRef, TenantNet
from worker.cli.commands import instance_arguments
from worker.cli.context import (
    CliError,
    check_id,
    config_option,
    failures,
    json_option,
    print_json,
    settings_of,
)

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
    """What to write. `artifacts` maps `vmlinux`, `rootfs.ext4`, `initrd` to the files to copy."""

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
    """The resulting state. `revision` is None while the pool has no artifacts."""

    net: TenantNet
    guest_ip: str
    tap: str
    revision: str | None


def net_of(net_id: int) -> TenantNet:
    """The subnet by agentd's formula: `10.(240 + (id >> 8)).(id & 255).0/24`."""
    base = f"10.{240 + (net_id >> 8)}.{net_id & 255}"
    return TenantNet(net_id, f"{base}.0/24", f"{base}.1", naming.bridge_name(net_id))


def write_seed(data_root: str, seed: Seed) -> Seeded:
    """Create the files that are missing below `data_root`.

    Raises:
        CliError: `invalid` IDs; `conflict` with an existing file; `exhausted` addresses.
    """
    check_id("tenant", seed.ref.tenant_id)
    check_id("pool", seed.ref.pool_id)
    check_id("instance", seed.ref.instance_id)
    if not NET_IDS[0] <= seed.net_id <= NET_IDS[1]:
        raise CliError("invalid", f"tenant net ID {seed.net_id}: want {NET_IDS[0]}..{NET_IDS[1]}")
    pool = f"pools/{seed.ref.pool_id}"
    with failures(), TenantWriter(data_root, seed.ref.tenant_id) as files:
        net = _write_tenant(files, seed)
        if seed.secrets is not None:
            files.write("secrets.json", seed.secrets, mode=0o600)
        _write_pool(files, pool, seed)
        revision = _write_artifacts(files, f"{pool}/artifacts", seed.artifacts)
        instance = _write_instance(files, pool, seed, net)
    return Seeded(net, instance["guest_ip"], instance["tap_dev"], revision)


def _write_tenant(files: TenantWriter, seed: Seed) -> TenantNet:
    net = net_of(seed.net_id)
    name = "tenant.json"
    if (content := files.read(name)) is not None:
        with _named(files):
            there = parse_tenant(content, name, seed.ref.tenant_id)
        found = there.net.tenant_net_id
        if found != seed.net_id:
            raise CliError(
                "conflict",
                f"{files.named(name)}: the tenant has net ID {found}: use "
                f"--net-id {found}, or remove the tenant to give it {seed.net_id}",
            )
        return there.net
    _write_json(
        files,
        name,
        {
            "tenant_id": seed.ref.tenant_id,
            "quotas": _QUOTAS,
            "net": {name: getattr(net, name) for name in net.__struct_fields__},
            "secrets_epoch": 0,
            "config_version": 1,
            "pinned": False,
            "audit_retention_days": 0,
            "created_at": _now(),
        },
    )
    return net


def _write_pool(files: TenantWriter, pool: str, seed: Seed) -> None:
    name = f"{pool}/pool.json"
    if (content := files.read(name)) is not None:
        with _named(files, pool):
            parse_pool(content, "pool.json", seed.ref.tenant_id, seed.ref.pool_id)
    spec = _read(files, name) or {
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
    metadata: dict[str, Any] = spec.get("metadata") or {}
    spec["metadata"] = metadata | {"tags": {**(metadata.get("tags") or {}), **seed.tags}}
    _write_json(files, name, spec)


def _write_artifacts(files: TenantWriter, name: str, artifacts: dict[str, str]) -> str | None:
    """Copy into `revisions/<hash of the content>` and point the `current` symlink at it."""
    current = f"{name}/current"
    if not artifacts:
        target = files.link_target(current)
        return target.removeprefix("revisions/") if target else None
    revision = _hash(artifacts)
    files.copy(f"{name}/revisions/{revision}", artifacts)
    files.link(current, f"revisions/{revision}")
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


def _write_instance(files: TenantWriter, pool: str, seed: Seed, net: TenantNet) -> dict[str, Any]:
    directory = f"{pool}/instances/{seed.ref.instance_id}"
    files.make(f"{directory}/volumes")
    name = f"{directory}/instance.json"
    if (content := files.read(name)) is not None:
        with _named(files, directory):
            found = parse_instance(content, "instance.json", seed.ref).net
            return dict(msgspec.structs.asdict(found))
    offset = seed.offset or _free_offset(files, net)
    instance_net = {
        "tap_dev": naming.tap_name(net.tenant_net_id, offset),
        "mac": naming.mac_address(net.tenant_net_id, offset),
        "guest_ip": naming.guest_ip(net, offset),
        "gateway_ip": net.gateway_ip,
        "cidr": naming.prefix_len(net),
    }
    _write_json(
        files,
        name,
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


def _free_offset(files: TenantWriter, net: TenantNet) -> int:
    """The lowest address offset that no instance of the tenant uses, as agentd allocates it."""
    base = ipaddress.IPv4Network(net.ipv4_subnet).network_address
    taken: set[int] = set()
    for pool in files.names("pools"):
        instances = f"pools/{pool}/instances"
        for instance in files.names(instances):
            name = f"{instances}/{instance}/instance.json"
            there = _read(files, name)
            if there is None:
                continue
            try:
                taken.add(int(ipaddress.IPv4Address(there["net"]["guest_ip"])) - int(base))
            except (KeyError, TypeError, ValueError) as error:
                raise CliError(
                    "invalid", f"{files.named(name)}: $.net.guest_ip: expected an IPv4 address"
                ) from error
    for offset in range(naming.OFFSET_MIN, naming.OFFSET_MAX + 1):
        if offset not in taken:
            return offset
    raise CliError(
        "exhausted", f"{files.named('pools')}: all addresses of {net.ipv4_subnet} are in use"
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.contextmanager
def _named(files: TenantWriter, directory: str = "") -> Generator[None]:
    """What the worker would refuse in a file of the directory is `invalid`, with its path."""
    try:
        yield
    except DecodeError as error:
        raise CliError("invalid", f"{files.named(directory).removesuffix('/')}/{error}") from error


def _read(files: TenantWriter, name: str) -> dict[str, Any] | None:
    content = files.read(name)
    if content is None:
        return None
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError, RecursionError) as error:
        raise CliError("invalid", f"{files.named(name)} is not a JSON object: {error}") from error


def _write_json(files: TenantWriter, name: str, value: dict[str, Any]) -> None:
    files.write(name, json.dumps(value, indent=2).encode() + b"\n", mode=0o644)


def _tags(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> object:
    pairs = [value.partition("=") for value in values]
    if bad := [name for name, equals, _ in pairs if not equals or not name]:
        raise click.BadParameter(f"invalid tag {bad[0]!r}: expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


_FILE = click.Path(exists=True, dir_okay=False)


@click.command()
@instance_arguments
@click.option("--net-id", type=click.IntRange(*NET_IDS), required=True, help="Tenant net ID.")
@click.option(
    "--vmlinux", type=_FILE, help="Kernel image; with --rootfs, becomes the current revision."
)
@click.option("--rootfs", type=_FILE, help="Root file system image (ext4).")
@click.option("--initrd", type=_FILE, help="Initial RAM disk.")
@click.option("--vcpus", type=click.IntRange(1, 32), default=1, show_default=True, help="vCPUs.")
@click.option(
    "--mem-mib", type=click.IntRange(1), default=128, show_default=True, help="Memory in MiB."
)
@click.option(
    "--data-disk-mib",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Data disk in MiB; 0 for none.",
)
@click.option(
    "--tag", "tags", multiple=True, callback=_tags, metavar="K=V", help="Pool tag; repeatable."
)
@click.option("--secrets", type=click.File("rb"), help="File copied to the tenant's secrets.json.")
@click.option(
    "--offset",
    type=click.IntRange(naming.OFFSET_MIN, naming.OFFSET_MAX),
    help="Address offset in the subnet. Default: the lowest free one.",
)
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
    """Create tenant, pool and instance files as agentd does. Keeps existing ones."""
    if (vmlinux is None) != (rootfs is None) or (initrd and not vmlinux):
        raise click.UsageError(
            "--vmlinux and --rootfs must be given together; --initrd requires both"
        )
    files = {"vmlinux": vmlinux, "rootfs.ext4": rootfs, "initrd": initrd}
    ref = InstanceRef(tenant_id, pool_id, instance_id)
    root = settings_of(config).paths.data
    wanted = Seed(
        ref,
        net_id,
        artifacts={name: path for name, path in files.items() if path is not None},
        secrets=secrets.read() if secrets is not None else None,
        **values,
    )
    try:
        seeded = write_seed(root, wanted)
    except CliError as error:
        if error.code != Code.HOST_FAULT:
            raise
        raise CliError(
            error.code,
            f"{error.message}; run as root, or set [paths] data to a directory that you can "
            "write to",
        ) from error
    if as_json:
        print_json({"guest_ip": seeded.guest_ip, "tap": seeded.tap, "revision": seeded.revision})
    else:
        click.echo(
            f"{ref}: address {seeded.guest_ip}, bridge {seeded.net.bridge_name}, files in {root}"
        )
        click.echo(f"revision: {seeded.revision or 'none (add one with --vmlinux and --rootfs)'}")
