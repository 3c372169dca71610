"""A host with hostd's own jails, drives, data disk and snapshots, on top of the VMM rig."""

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from handlers.host.jail.jails import Jails
from handlers.host.snapshot.snapshots import Snapshots
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
from handlers.host.vmm.warm_pool import WarmPool
from handlers.specs import (
    Artifact,
    ArtifactSpec,
    BootConfig,
    CgroupSpec,
    DataDisk,
    DataDiskSpec,
    DriveConfig,
    JailFile,
    JailSpec,
    LaunchSpec,
    NicConfig,
    SnapshotFacts,
)
from schemas import naming
from tests.kernel.storage.store_host import REF, REVISION, StoreHost, make_world
from tests.vm.vmm_rig import BOOT_ARGS, MAC, MIB, MINI, TAP, UID, VmmRig, add_tap, need

MEM_MIB = 32
PORT = 5252
DRIVES = (
    DriveConfig("rootfs", "/rootfs.ext4", read_only=True),
    DriveConfig("config", "/config.ext4", read_only=True),
    DriveConfig("data", "/data.ext4", read_only=False),
    DriveConfig("secrets", "/secrets/secrets.ext4", read_only=True),
)


@dataclass
class StoreRig:
    rig: VmmRig
    world: StoreHost
    jails: Jails
    snapshots: Snapshots
    artifact: Artifact
    disk: DataDisk
    uid: int = UID

    def change_uid(self, uid: int) -> None:
        """Of the launches from now on; the TAP is created again for it."""
        subprocess.run(["ip", "tuntap", "del", TAP, "mode", "tap"], check=True, timeout=10)
        add_tap(TAP, uid)
        self.uid = uid

    async def launch(self, number: int, pool: WarmPool | None = None) -> LaunchSpec:
        """A jailed VMM whose API answers, in a jail made by the store; a claim of it is used."""
        jail_id = naming.jail_id(REF, number)
        spec = LaunchSpec(jail_id, self.uid, self.rig.tree.name("acme", jail_id))
        await self.rig.cgroups.ensure(CgroupSpec("acme", jail_id, 256 * MIB, 100_000, 64))
        self.rig.launches.append(spec)
        async with pool.used_by(spec) if pool else contextlib.nullcontext() as warm:
            entering = asyncio.ensure_future(warm.enter()) if warm else None
            await self.jails.ensure(
                JailSpec(
                    ref=REF,
                    jail_id=jail_id,
                    uid=self.uid,
                    files=(
                        JailFile("vmlinux", self.artifact.vmlinux),
                        JailFile("rootfs.ext4", self.artifact.rootfs),
                        JailFile("data.ext4", self.disk.path, self.disk.identity),
                    ),
                    config=b'{"vcpus": 1}',
                    secrets=b'{"key": "hush"}',
                    warm=warm.jail_id if warm else None,
                )
            )
            if entering is not None:
                await entering
        await self.rig.vmms.ensure(spec)
        return spec

    async def boot(self, number: int, pool: WarmPool | None = None) -> LaunchSpec:
        spec = await self.launch(number, pool)
        vmm = self.rig.vmms.api(spec.jail_id)
        await vmm.configure(
            BootConfig(
                vcpus=1,
                mem_mib=MEM_MIB,
                kernel="/vmlinux",
                initrd=None,
                boot_args=BOOT_ARGS,
                drives=DRIVES,
                nic=NicConfig(TAP, MAC),
                vsock="/v.sock",
            )
        )
        await vmm.start()
        await vmm.close()
        await self.rig.agents.ping(spec.jail_id, PORT, timeout_s=10)
        return spec

    async def sleep(self, spec: LaunchSpec) -> None:
        """Pause, write, seal, publish; then the VMM and its jail go."""
        vmm = self.rig.vmms.api(spec.jail_id)
        await vmm.pause()
        await vmm.create_snapshot(*await self.snapshots.begin_write(spec.jail_id, spec.uid))
        facts = SnapshotFacts(
            ref=REF,
            number=1,
            launch=1,
            revision=REVISION,
            vcpus=1,
            mem_mib=MEM_MIB,
            vmm_version=await vmm.version(),
            disk=self.disk.identity,
            data_disk_path=self.disk.path,
            keep_drives=False,
        )
        await vmm.close()
        await self.snapshots.seal(spec.jail_id, facts)
        await self.snapshots.publish(REF, 1)
        await self.rig.vmms.remove(spec.jail_id)
        await self.jails.remove(spec.jail_id)


@contextlib.asynccontextmanager
async def open_store(rig: VmmRig) -> AsyncGenerator[StoreRig]:
    need(MINI / "vmlinux")
    world = make_world(rig.directory)
    for name in ("vmlinux", "rootfs.ext4"):
        shutil.copyfile(MINI / name, world.revision / name)
    data, state = str(world.data), rig.settings.paths.state
    base = rig.settings.jail_base
    snapshots = Snapshots(
        data=data, state=state, jail_base=base, cpu_model="here", kernel_release="here"
    )
    jails = Jails(data=data, state=state, jail_base=base)
    disk = await DataDisks(data=data, jail_base=base).ensure(DataDiskSpec(REF, 8, None))
    artifact = await Artifacts(data=data, state=state).ensure(ArtifactSpec("acme", "web", REVISION))
    yield StoreRig(rig, world, jails, snapshots, artifact, disk)
    snapshots.close()
    for spec in rig.launches:
        await rig.vmms.remove(spec.jail_id)
        await jails.remove(spec.jail_id)
