"""Jails, drives and snapshots made by hostd's mechanisms, used by the real VMM."""

import os
import shutil
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from handlers.errors import HostFault
from handlers.host.jail.jails import Jails
from handlers.host.snapshot.manifest import numbers_of
from handlers.host.snapshot.snapshots import Snapshots
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
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
from tests.vm.vmm_rig import BOOT_ARGS, MAC, MIB, MINI, TAP, UID, VmmRig, need

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

    async def launch(self, number: int) -> LaunchSpec:
        """A jailed VMM whose API answers, in a jail made by the store."""
        jail_id = naming.jail_id(REF, number)
        spec = LaunchSpec(jail_id, UID, self.rig.tree.name("acme", jail_id))
        await self.rig.cgroups.ensure(CgroupSpec("acme", jail_id, 256 * MIB, 100_000, 64))
        self.rig.launches.append(spec)
        await self.jails.ensure(
            JailSpec(
                ref=REF,
                jail_id=jail_id,
                uid=UID,
                files=(
                    JailFile("vmlinux", self.artifact.vmlinux),
                    JailFile("rootfs.ext4", self.artifact.rootfs),
                    JailFile("data.ext4", self.disk.path, self.disk.identity),
                ),
                config=b'{"vcpus": 1}',
                secrets=b'{"key": "hush"}',
            )
        )
        await self.rig.vmms.ensure(spec)
        return spec

    async def boot(self, number: int) -> LaunchSpec:
        spec = await self.launch(number)
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
        await vmm.create_snapshot(*await self.snapshots.begin_write(spec.jail_id, UID))
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


@pytest_asyncio.fixture(name="store")
async def store_of_the_rig(rig: VmmRig) -> AsyncIterator[StoreRig]:
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


async def test_a_guest_sleeps_and_wakes_from_files_its_vmm_can_only_read(store: StoreRig) -> None:
    first = await store.boot(1)
    await store.sleep(first)
    disk = os.stat(store.disk.path)
    assert (disk.st_uid, stat.S_IMODE(disk.st_mode), disk.st_nlink) == (0, 0o600, 1)

    second = await store.launch(2)
    vmm = store.rig.vmms.api(second.jail_id)
    info = await store.snapshots.verify(REF, 1)
    paths = await store.snapshots.link(second.jail_id, UID, info)
    await vmm.load_snapshot(*paths)
    await vmm.resume()
    await vmm.close()
    await store.snapshots.delete_all(REF)

    ack = await store.rig.agents.wake(second.jail_id, PORT, timeout_s=10)
    assert ack.success
    await store.rig.agents.ping(second.jail_id, PORT, timeout_s=10)
    assert numbers_of(f"{store.rig.settings.paths.state}/snapshots", REF) == []
    woken = Path(store.rig.settings.jail_base, "firecracker", second.jail_id, "root", "woken")
    assert (woken / "mem").stat().st_uid == 0
    assert b"Artificially kick devices" in await store.jails.read_log(REF, 2)


async def test_a_truncated_memory_file_is_refused_by_hostd_though_the_vmm_accepts_it(
    store: StoreRig,
) -> None:
    await store.sleep(await store.boot(1))
    memory = store.world.top / "snapshots" / str(REF) / "1" / "mem"
    size = memory.stat().st_size
    os.truncate(memory, size // 2)
    os.truncate(memory, size)

    with pytest.raises(HostFault, match="modified before it was hashed"):
        await store.snapshots.verify(REF, 1)
