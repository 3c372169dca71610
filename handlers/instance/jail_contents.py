"""The files in an instance's jail, and the VMM's configuration made of them."""

import msgspec
from msgspec.structs import replace

from handlers.instance.launch_plan import Launch
from handlers.jail_names import (
    CONFIG_DRIVE,
    DATA_DISK,
    INITRD,
    KERNEL,
    ROOTFS,
    SECRETS_DIR,
    SECRETS_DRIVE,
    SERIAL,
    VSOCK_SOCKET,
    in_jail,
)
from handlers.specs import (
    Artifact,
    BootConfig,
    DataDisk,
    DriveConfig,
    Jail,
    JailFile,
    JailSpec,
    NicConfig,
)
from schemas import naming


def config_json(launch: Launch) -> bytes:
    """`config.json` of the config drive, its fields as in the contract."""
    document = {
        "instance_id": launch.ref.instance_id,
        "pool_id": launch.ref.pool_id,
        "tenant_id": launch.ref.tenant_id,
        "guest_ip": launch.names.guest_ip,
        "vcpus": launch.record.vcpus,
        "mem_mib": launch.record.mem_mib,
        "min_runtime_policy": msgspec.to_builtins(launch.pool.runtime_policy),
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def jail_spec(
    launch: Launch,
    artifact: Artifact,
    disk: DataDisk | None,
    *,
    secrets: bytes | None,
    kept_config: str | None = None,
    kept_secrets: str | None = None,
) -> JailSpec:
    """The jail's files: artifacts read-only, the data disk writable, the small drives."""
    files = [
        JailFile(KERNEL, artifact.vmlinux),
        JailFile(ROOTFS, artifact.rootfs),
    ]
    if artifact.initrd is not None:
        files.append(JailFile(INITRD, artifact.initrd))
    if disk is not None:
        files.append(JailFile(DATA_DISK, disk.path, disk.identity))
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


def boot_config(
    launch: Launch, artifact: Artifact, jail: Jail, *, has_data: bool, boot_args: str
) -> BootConfig:
    """Drives in the order rootfs, config, data, secrets; a guest finds them by label.

    `boot_args` are the operator's, added to hostd's own.
    """
    drives = [DriveConfig("rootfs", in_jail(ROOTFS), read_only=True, root_device=True)]
    if jail.has_config:
        drives.append(DriveConfig("config", in_jail(CONFIG_DRIVE), read_only=True))
    if has_data:
        drives.append(DriveConfig("data", in_jail(DATA_DISK), read_only=False))
    if jail.has_secrets:
        drives.append(DriveConfig("secrets", in_jail(SECRETS_DIR, SECRETS_DRIVE), read_only=True))
    names = launch.names
    address = f"ip={names.guest_ip}::{names.net.gateway_ip}:{naming.netmask(names.net)}::eth0:off"
    return BootConfig(
        vcpus=launch.record.vcpus,
        mem_mib=launch.record.mem_mib,
        kernel=in_jail(KERNEL),
        initrd=in_jail(INITRD) if artifact.initrd is not None else None,
        boot_args=" ".join(part for part in ("reboot=k panic=1", address, boot_args) if part),
        drives=tuple(drives),
        nic=NicConfig(names.tap, names.mac),
        vsock=in_jail(VSOCK_SOCKET),
        serial=in_jail(SERIAL) if launch.pool.serial else None,
    )
