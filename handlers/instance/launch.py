"""What Start and Wake share: from plan to a confined VMM with its network, and the way back.

Order matters. The network's rules stand before the TAP is up; the cgroup before the jailer, which
silently goes on without a missing one; the jail's files before the jailer, which chroots into it.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from handlers.cancellation import Interrupted, race
from handlers.errors import Conflict, Failure, Invalid, Superseded, Unavailable
from handlers.instance.reservations import ReservationSpec
from handlers.interfaces import CPU_PERIOD_US, Host
from handlers.mechanism import Removable
from handlers.network_names import Names, names_of
from handlers.specs import MIB, Artifact, CgroupSpec, JailFile, JailSpec, LaunchSpec
from handlers.steps import Steps
from schemas.decode_error import DecodeError
from schemas.files import InstanceFile, PoolSpec, TenantConfig, check_instance_net, offset_of
from schemas.records import DiskIdentity, InstanceRecord, Status, VmmIdentity
from schemas.requests import InstanceRef, TenantNet

PIDS_PER_VMM = 64
LOG_TAIL_BYTES = 4096
KERNEL, INITRD, ROOTFS, DATA = "/vmlinux", "/initrd", "/rootfs.ext4", "/data.ext4"
CONFIG, SECRETS, VSOCK, SERIAL = "/config.ext4", "/secrets/secrets.ext4", "/v.sock", "/serial"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the files of agentd ask for, checked. Nothing on the host was touched."""

    tenant: TenantConfig
    pool: PoolSpec
    file: InstanceFile
    offset: int

    @property
    def net(self) -> TenantNet:
        return self.tenant.net


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: its reserved record, its names and what its VMM runs as."""

    record: InstanceRecord
    pool: PoolSpec
    names: Names
    vmm: LaunchSpec

    @property
    def ref(self) -> InstanceRef:
        return self.record.ref

    @property
    def jail_id(self) -> str:
        return self.record.jail_id


def launch_of(record: InstanceRecord, pool: PoolSpec, host: Host) -> Launch:
    """The launch that a reserved record stands for."""
    names = names_of(record)
    if names is None or record.uid_slot is None:
        raise Conflict(f"instance {record.ref} has no launch reserved")
    spec = LaunchSpec(
        jail_id=record.jail_id,
        uid=host.settings.vmm.uid_base + record.uid_slot,
        cgroup=f"{host.settings.limits.cgroup}/{record.ref.tenant_id}/{record.jail_id}",
    )
    return Launch(record, pool, names, spec)


async def read_wanted(ref: InstanceRef, record: InstanceRecord, host: Host) -> Wanted:
    """Read and check what a launch of the instance needs.

    Raises:
        NotFound, Invalid: a file is missing or wrong; names file and field.
        Conflict: the tenant's network is not set up, or another address was journalled.
    """
    tenant, pool, file = await host.shared.of_launch(ref)
    try:
        offset = offset_of(file.net.guest_ip, tenant.net)
        check_instance_net(file, tenant.net, offset)
    except DecodeError as error:
        raise Invalid(error.message, path=error.path) from error
    if record.offset is not None and record.offset != offset:
        raise Conflict(
            f"instance {ref} was started with address offset {record.offset}, not {offset}",
            path="instance.json: $.net.guest_ip",
        )
    network = host.records.network(ref.tenant_id)
    if network is None or network.status != "up" or network.net != tenant.net:
        raise Conflict(f"the network of tenant {ref.tenant_id} is not set up: SetupNetwork first")
    return Wanted(tenant, pool, file, offset)


def reservation(
    wanted: Wanted,
    before: InstanceRecord,
    steps: Steps,
    *,
    status: Status,
    revision: str,
    now_ms: int,
) -> ReservationSpec:
    resources = wanted.pool.instance_resources
    return ReservationSpec(
        command_id=steps.command_id,
        before=before,
        status=status,
        now_ms=now_ms,
        quota=wanted.tenant.quotas,
        net=wanted.net,
        offset=wanted.offset,
        revision=revision,
        vcpus=resources.vcpus,
        mem_mib=resources.mem_mib,
        agent_port=wanted.pool.agent_port if wanted.pool.ready == "agent" else None,
    )


def launch_resources(launch: Launch, host: Host) -> list[tuple[Removable, str]]:
    """Cgroup, pin and TAP of the launch, as they are announced."""
    cgroup = f"{launch.ref.tenant_id}/{launch.jail_id}"
    names = launch.names
    return [(host.cgroups, cgroup), (host.pins, names.pin.key), (host.taps, names.tap)]


async def ensure_cgroup(launch: Launch, steps: Steps, host: Host) -> None:
    """The leaf that the VMM is born into, its limits in force."""
    await steps.ensure(
        host.cgroups,
        CgroupSpec(
            tenant_id=launch.ref.tenant_id,
            jail_id=launch.jail_id,
            memory_max_bytes=(launch.record.mem_mib + host.settings.limits.vmm_overhead_mib) * MIB,
            cpu_quota_us=launch.record.vcpus * CPU_PERIOD_US,
            pids_max=PIDS_PER_VMM,
        ),
    )


async def ensure_port(launch: Launch, steps: Steps, host: Host) -> None:
    """Under the tenant's network lock: the pin and then the TAP."""
    async with host.locks.shared(launch.ref.tenant_id):
        network = host.records.network(launch.ref.tenant_id)
        if network is None or network.status != "up":
            raise Conflict(f"the network of tenant {launch.ref.tenant_id} was taken down")
        await steps.ensure(host.pins, launch.names.pin)
        await steps.ensure(host.taps, launch.names.tap_spec(launch.ref, launch.vmm.uid))


def config_json(launch: Launch) -> bytes:
    """`config.json` of the config drive, as the contract names its fields."""
    document = {
        "instance_id": launch.ref.instance_id,
        "pool_id": launch.ref.pool_id,
        "tenant_id": launch.ref.tenant_id,
        "guest_ip": launch.names.guest_ip,
        "vcpus": launch.record.vcpus,
        "mem_mib": launch.record.mem_mib,
        "min_runtime_policy": msgspec.to_builtins(launch.pool.runtime_policy),
    }
    return json.dumps(document, indent=2).encode() + b"\n"


def jail_spec(
    launch: Launch,
    artifact: Artifact,
    data_path: str | None,
    *,
    secrets: bytes | None,
    kept_config: str | None = None,
    kept_secrets: str | None = None,
) -> JailSpec:
    """The jail's files: artifacts read-only, the data disk writable, the small drives."""
    files = [
        JailFile(KERNEL.lstrip("/"), artifact.vmlinux),
        JailFile(ROOTFS.lstrip("/"), artifact.rootfs),
    ]
    if artifact.initrd is not None:
        files.append(JailFile(INITRD.lstrip("/"), artifact.initrd))
    if data_path is not None:
        files.append(JailFile(DATA.lstrip("/"), data_path, writable=True))
    return JailSpec(
        ref=launch.ref,
        jail_id=launch.jail_id,
        uid=launch.vmm.uid,
        files=tuple(files),
        config=config_json(launch) if kept_config is None else None,
        secrets=secrets if kept_secrets is None else None,
        kept_config=kept_config,
        kept_secrets=kept_secrets,
        serial=launch.pool.serial,
        record=replace(launch.record, before=None, command_id=None),
    )


async def record_vmm(launch: Launch, identity: VmmIdentity, host: Host) -> InstanceRecord:
    """Remember the VMM's identity: what a restarted worker adopts it by."""
    record = host.records.instance(launch.ref)
    if record is None:
        raise Conflict(f"instance {launch.ref} is no longer in the journal")
    record = replace(record, vmm=identity)
    await host.records.put_instance(record)
    return record


async def record_disk(launch: Launch, disk: DiskIdentity, host: Host) -> Launch:
    """Remember, durably, the data disk that hostd made: another file in its place is refused."""
    record = launch.record
    if record.disk == disk:
        return launch
    record = replace(record, disk=disk)
    await host.records.put_instance(record, durable=True)
    return dataclasses.replace(launch, record=record)


async def log_tail(record: InstanceRecord, host: Host) -> str:
    """The last 4 KiB of the VMM's log of the record's launch."""
    log = await host.jails.read_log(record.ref, record.launch)
    return log[-LOG_TAIL_BYTES:].decode(errors="replace")


async def add_log(failure: Failure, record: InstanceRecord, host: Host) -> None:
    """Give the failure the end of the VMM's log, for the reply and the event."""
    if isinstance(failure, Superseded):
        return
    with contextlib.suppress(Failure, OSError):  # what could be told is told
        failure.detail.setdefault("vmm_log", await log_tail(record, host))


async def race_vmm_exit(
    identity: VmmIdentity, do: Callable[[], Coroutine[None, None, None]], host: Host
) -> None:
    """Do it, but no longer than the VMM lives.

    Raises:
        Unavailable: the VMM ended; for good, since a guest must not boot twice under one id.
    """
    try:
        await race(do(), host.vmms.wait_exit(identity, float("inf")))
    except Interrupted as error:
        message = "the VMM ended before its guest agent answered"
        raise Unavailable(message).not_retryable() from error
