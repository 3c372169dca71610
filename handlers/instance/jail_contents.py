"""The files in an instance's jail, their names, and the VMM's configuration made of them."""

import json

import msgspec
from msgspec.structs import replace

from handlers.instance.launch_plan import Launch
from handlers.specs import Artifact, BootConfig, DriveConfig, Jail, JailFile, JailSpec, NicConfig
from schemas import naming

KERNEL, INITRD, ROOTFS, DATA = "/vmlinux", "/initrd", "/rootfs.ext4", "/data.ext4"
CONFIG, SECRETS, VSOCK, SERIAL = "/config.ext4", "/secrets/secrets.ext4", "/v.sock", "/serial"


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


def boot_config(
    launch: Launch, artifact: Artifact, jail: Jail, *, has_data: bool, boot_args: str
) -> BootConfig:
    """Drives in the order rootfs, config, data, secrets; a guest finds them by label.

    `boot_args` are the operator's, added to hostd's own.
    """
    drives = [DriveConfig("rootfs", ROOTFS, read_only=True, root_device=True)]
    if jail.has_config:
        drives.append(DriveConfig("config", CONFIG, read_only=True))
    if has_data:
        drives.append(DriveConfig("data", DATA, read_only=False))
    if jail.has_secrets:
        drives.append(DriveConfig("secrets", SECRETS, read_only=True))
    names = launch.names
    address = f"ip={names.guest_ip}::{names.net.gateway_ip}:{naming.netmask(names.net)}::eth0:off"
    return BootConfig(
        vcpus=launch.record.vcpus,
        mem_mib=launch.record.mem_mib,
        kernel=KERNEL,
        initrd=INITRD if artifact.initrd is not None else None,
        boot_args=" ".join(part for part in ("reboot=k panic=1", address, boot_args) if part),
        drives=tuple(drives),
        nic=NicConfig(names.tap, names.mac),
        vsock=VSOCK,
        serial=SERIAL if launch.pool.serial else None,
    )
