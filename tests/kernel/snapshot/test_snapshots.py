"""A snapshot is all there, as it was saved, and this instance's own, or it is refused."""

import asyncio
import hashlib
import mmap
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from handlers.errors import Exhausted, HostFault
from handlers.host.jail.jails import Jails
from handlers.host.linux.sparse_copy import sha256_of
from handlers.host.snapshot import memory_file, sealer
from handlers.host.snapshot.manifest import SnapshotDir, numbers_of, published_versions, sleeps_on
from handlers.host.snapshot.snapshots import Snapshots
from handlers.host.storage.data_disks import DataDisks
from handlers.host.storage.drive_images import CONFIG, SECRETS
from handlers.interfaces import Discarded
from handlers.specs import DataDisk, DataDiskSpec, JailFile, JailSpec, SnapshotFacts
from schemas import naming
from schemas.requests import InstanceRef
from tests.kernel.storage.store_host import REF, StoreHost, make_world

UID = 2_000_000_007
VMM = "1.12.1"
MEM_MIB = 2
OTHER = InstanceRef("acme", "web", "i-other")


@dataclass
class Asleep:
    """An instance that was jailed, whose VMM wrote state and memory; `seal` puts it to sleep."""

    world: StoreHost
    jails: Jails
    snapshots: Snapshots
    disk: DataDisk
    facts: SnapshotFacts
    memory: bytes

    @property
    def jail_id(self) -> str:
        return naming.jail_id(REF, self.facts.launch)

    @property
    def root(self) -> Path:
        return self.world.jails / "firecracker" / self.jail_id / "root"

    @property
    def directory(self) -> Path:
        return self.world.state / "snapshots" / str(REF) / str(self.facts.number)

    async def jail(self, launch: int) -> str:
        jail_id = naming.jail_id(REF, launch)
        files = (JailFile("data.ext4", self.disk.path, self.disk.identity),)
        await self.jails.ensure(
            JailSpec(REF, jail_id, UID, files, config=b"{}", secrets=b'{"s": "hush"}')
        )
        return jail_id

    def on_disk(self) -> list[tuple[int, bool]]:
        """The numbers of all snapshots of the instance, and whether each is published."""
        base = f"{self.world.state}/snapshots"
        numbers = numbers_of(base, REF)
        return [(number, SnapshotDir(base, REF, number).published) for number in numbers]

    async def vmm_writes(self, state: bytes = b"device state") -> None:
        await self.snapshots.begin_write(self.jail_id, UID)
        for name, data in (("state", state), ("mem", self.memory)):
            path = self.root / "snap" / name
            path.write_bytes(data)
            os.chown(path, UID, UID)

    async def sleep(self) -> None:
        await self.vmm_writes()
        await self.snapshots.seal(self.jail_id, self.facts)
        await self.snapshots.publish(REF, self.facts.number)
        await self.jails.remove(self.jail_id)

    async def verify(self) -> None:
        await self.snapshots.verify(REF, self.facts.number)


def new_snapshots(world: StoreHost, cpu_model: str = "GenuineTest 6 85 7") -> Snapshots:
    return Snapshots(
        data=str(world.data),
        state=str(world.state),
        jail_base=str(world.jails),
        cpu_model=cpu_model,
        kernel_release="6.1.0-test",
    )


@asynccontextmanager
async def at_sleep(top: Path) -> AsyncGenerator[Asleep]:
    world = make_world(top)
    jails = Jails(data=str(world.data), state=str(world.state), jail_base=str(world.jails))
    disks = DataDisks(data=str(world.data), jail_base=str(world.jails))
    disk = await disks.ensure(DataDiskSpec(REF, 8, None))
    facts = SnapshotFacts(
        ref=REF,
        number=1,
        launch=1,
        revision="0f3kq9",
        vcpus=1,
        mem_mib=MEM_MIB,
        vmm_version=VMM,
        disk=disk.identity,
        data_disk_path=disk.path,
        keep_drives=False,
    )
    snapshots = new_snapshots(world)
    one = Asleep(world, jails, snapshots, disk, facts, os.urandom(MEM_MIB << 20))
    await one.jail(1)
    yield one
    snapshots.close()
    for jail in await jails.list_ids():
        await jails.remove(jail)


@pytest.fixture
async def asleep(tmp_path: Path) -> AsyncIterator[Asleep]:
    async with at_sleep(tmp_path) as one:
        yield one


async def test_the_vmm_gets_an_empty_directory_of_its_own(asleep: Asleep) -> None:
    (asleep.root / "snap").symlink_to("/etc")

    paths = await asleep.snapshots.begin_write(asleep.jail_id, UID)

    assert paths == ("/snap/state", "/snap/mem")
    found = (asleep.root / "snap").lstat()
    assert stat.S_ISDIR(found.st_mode)
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (UID, 0o700)
    assert os.listdir(asleep.root / "snap") == []


async def test_sealed_files_are_roots_and_nothing_before_they_are_published(
    asleep: Asleep,
) -> None:
    await asleep.vmm_writes()
    info = await asleep.snapshots.seal(asleep.jail_id, asleep.facts)

    assert os.listdir(asleep.root / "snap") == []
    assert await asleep.snapshots.read(REF) is None
    with pytest.raises(HostFault, match=r"manifest\.json is missing"):
        await asleep.verify()
    for path in (info.state_path, info.mem_path):
        found = os.stat(path)
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o600)
    assert stat.S_IMODE(asleep.directory.stat().st_mode) == 0o700
    assert Path(info.mem_path).read_bytes() == asleep.memory

    await asleep.snapshots.publish(REF, 1)
    await asleep.snapshots.publish(REF, 1)

    assert await asleep.snapshots.read(REF) == info
    assert asleep.on_disk() == [(1, True)]
    assert (info.launch, info.revision, info.mem_mib) == (1, "0f3kq9", MEM_MIB)
    assert info.size_bytes == (MEM_MIB << 20) + len(b"device state")


async def test_a_sound_snapshot_passes_also_after_a_restart(asleep: Asleep) -> None:
    await asleep.sleep()

    info = await asleep.snapshots.verify(REF, 1)
    later = new_snapshots(asleep.world)

    assert await later.verify(REF, 1) == info == await later.read(REF)
    later.close()


Spoil = Callable[[Asleep], None]


def half_the_memory(asleep: Asleep) -> None:
    os.truncate(asleep.directory / "mem", MEM_MIB << 19)


def no_memory(asleep: Asleep) -> None:
    (asleep.directory / "mem").unlink()


def zeros_in_memory(asleep: Asleep) -> None:
    with (asleep.directory / "mem").open("r+b") as file:
        file.truncate(MEM_MIB << 19)
        file.truncate(MEM_MIB << 20)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def flipped_memory(asleep: Asleep) -> None:
    flip(asleep.directory / "mem", 12345)


def flipped_state(asleep: Asleep) -> None:
    flip(asleep.directory / "state", 3)


def flipped_state_with_its_times_kept(asleep: Asleep) -> None:
    found = (asleep.directory / "state").stat()
    flip(asleep.directory / "state", 3)
    os.utime(asleep.directory / "state", ns=(found.st_atime_ns, found.st_mtime_ns))


def flipped_memory_with_its_times_kept(asleep: Asleep) -> None:
    found = (asleep.directory / "mem").stat()
    flip(asleep.directory / "mem", 12345)
    os.utime(asleep.directory / "mem", ns=(found.st_atime_ns, found.st_mtime_ns))


def cut_state(asleep: Asleep) -> None:
    os.truncate(asleep.directory / "state", 5)


def flipped_manifest(asleep: Asleep) -> None:
    path = asleep.directory / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"vcpus":1', b'"vcpus":2'))


def cut_manifest(asleep: Asleep) -> None:
    os.truncate(asleep.directory / "manifest.json", 100)


def no_memory_facts(asleep: Asleep) -> None:
    (asleep.directory / "memory.json").unlink()


def newer_disk(asleep: Asleep) -> None:
    with open(asleep.disk.path, "r+b") as file:
        file.write(b"\0")


def another_disk(asleep: Asleep) -> None:
    path = Path(asleep.disk.path)
    found = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def no_disk(asleep: Asleep) -> None:
    Path(asleep.disk.path).unlink()


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        half_the_memory,
        no_memory,
        zeros_in_memory,
        flipped_memory,
        flipped_memory_with_its_times_kept,
        flipped_state,
        flipped_state_with_its_times_kept,
        cut_state,
        flipped_manifest,
        cut_manifest,
        no_memory_facts,
        newer_disk,
        another_disk,
        no_disk,
    ],
)
async def test_what_is_not_as_it_was_is_refused(asleep: Asleep, spoil: Spoil, hashed: bool) -> None:
    await asleep.sleep()
    if hashed:
        await asleep.snapshots.hash_memory(REF, 1)
    spoil(asleep)

    with pytest.raises(HostFault):
        await asleep.verify()


@pytest.mark.parametrize("name", ["mem", "state"])
async def test_a_file_put_right_can_be_woken(asleep: Asleep, name: str) -> None:
    await asleep.sleep()
    await asleep.snapshots.hash_memory(REF, 1)
    flip(asleep.directory / name, 7)
    with pytest.raises(HostFault):
        await asleep.verify()

    flip(asleep.directory / name, 7)

    await asleep.verify()


async def test_memory_touched_before_its_hash_was_taken_is_refused_even_if_right(
    asleep: Asleep,
) -> None:
    await asleep.sleep()
    flip(asleep.directory / "mem", 7)
    flip(asleep.directory / "mem", 7)

    with pytest.raises(HostFault, match="modified before it was hashed"):
        await asleep.verify()
    with pytest.raises(HostFault, match="modified before it was hashed"):
        await asleep.snapshots.hash_memory(REF, 1)


async def test_another_cpu_is_refused_and_the_vmms_version_is_for_the_wake(asleep: Asleep) -> None:
    await asleep.sleep()

    info = await asleep.snapshots.verify(REF, 1)
    assert info.vmm_version == VMM
    elsewhere = new_snapshots(asleep.world, cpu_model="AuthenticTest 25")
    with pytest.raises(HostFault, match="CPU GenuineTest"):
        await elsewhere.verify(REF, 1)
    elsewhere.close()

    await asleep.verify()


async def test_another_instances_snapshot_is_refused(asleep: Asleep) -> None:
    await asleep.sleep()
    asleep.directory.parent.rename(asleep.directory.parent.with_name(OTHER.instance_id))

    with pytest.raises(HostFault, match=r"found 1 of acme/web/i-0a1b2c3d"):
        await asleep.snapshots.verify(OTHER, 1)
    with pytest.raises(HostFault):
        await asleep.snapshots.read(OTHER)


# -- what a VMM may have done to its own files ---------------------------------------------------


def linked(asleep: Asleep) -> None:
    (asleep.root / "snap" / "mem").unlink()
    (asleep.root / "snap" / "mem").symlink_to("/etc/shadow")


def its_disk(asleep: Asleep) -> None:
    (asleep.root / "snap" / "mem").unlink()
    os.link(asleep.root / "data.ext4", asleep.root / "snap" / "mem")


def roots_file(asleep: Asleep) -> None:
    (asleep.root / "snap" / "state").unlink()
    (asleep.root / "config.ext4").rename(asleep.root / "snap" / "state")


def fifo(asleep: Asleep) -> None:
    (asleep.root / "snap" / "state").unlink()
    os.mkfifo(asleep.root / "snap" / "state")


def missing(asleep: Asleep) -> None:
    (asleep.root / "snap" / "mem").unlink()


def too_short(asleep: Asleep) -> None:
    os.truncate(asleep.root / "snap" / "mem", 4096)


def empty_state(asleep: Asleep) -> None:
    os.truncate(asleep.root / "snap" / "state", 0)


def linked_dir(asleep: Asleep) -> None:
    (asleep.root / "snap").rename(asleep.root / "elsewhere")
    (asleep.root / "snap").symlink_to("elsewhere")


@pytest.mark.parametrize(
    "spoil", [linked, its_disk, roots_file, fifo, missing, too_short, empty_state, linked_dir]
)
async def test_what_is_no_whole_snapshot_is_not_sealed(asleep: Asleep, spoil: Spoil) -> None:
    await asleep.vmm_writes()
    spoil(asleep)

    async with asyncio.timeout(10):
        with pytest.raises(HostFault):
            await asleep.snapshots.seal(asleep.jail_id, asleep.facts)

    assert not asleep.directory.exists()
    assert Path(asleep.disk.path).stat().st_uid == UID


async def test_a_full_disk_while_sealing_leaves_nothing_and_can_be_tried_again(
    asleep: Asleep, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asleep.vmm_writes()

    def full(path: str, facts: msgspec.Struct) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealer, "write_sealed", full)
    with pytest.raises(Exhausted):
        await asleep.snapshots.seal(asleep.jail_id, asleep.facts)
    monkeypatch.undo()
    assert not asleep.directory.exists()
    assert asleep.on_disk() == []

    await asleep.sleep()
    await asleep.verify()


async def test_a_partial_snapshot_in_the_jail_is_deleted_with_all_others(
    asleep: Asleep,
) -> None:
    await asleep.vmm_writes()

    await asleep.snapshots.delete_all(REF)

    assert not (asleep.root / "snap").exists()


async def test_an_interrupted_sleep_can_be_repeated(asleep: Asleep) -> None:
    await asleep.vmm_writes()
    await asleep.snapshots.seal(asleep.jail_id, asleep.facts)

    asleep.memory = os.urandom(MEM_MIB << 20)
    await asleep.sleep()

    assert (asleep.directory / "mem").read_bytes() == asleep.memory
    await asleep.verify()


# -- the hash -------------------------------------------------------------------------------------


async def test_the_hash_is_right_taken_once_and_kept(asleep: Asleep) -> None:
    await asleep.sleep()
    expected = hashlib.sha256(asleep.memory).hexdigest()

    assert await asleep.snapshots.hash_memory(REF, 1) == expected
    assert await asleep.snapshots.hash_memory(REF, 1) == expected
    await asleep.verify()
    assert await asleep.snapshots.hash_memory(REF, 2) is None


async def test_a_wake_while_the_hash_is_taken_disturbs_neither(
    asleep: Asleep, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asleep.sleep()
    reading, go_on = threading.Event(), threading.Event()
    real = sha256_of

    def slow(fd: int, *, check: Callable[[], None]) -> str:
        reading.set()
        wait()
        return real(fd, check=check)

    def wait() -> None:
        assert go_on.wait(10)

    monkeypatch.setattr(memory_file, "sha256_of", slow)
    hashing = asyncio.create_task(asleep.snapshots.hash_memory(REF, 1))
    await asyncio.to_thread(reading.wait, 10)
    info = await asleep.snapshots.verify(REF, 1)
    jail = await asleep.jail(2)
    await asleep.snapshots.link(jail, UID, info)
    go_on.set()

    assert await hashing == hashlib.sha256(asleep.memory).hexdigest()
    await asleep.jails.remove(jail)
    await asleep.snapshots.restore_ownership(REF, 1)
    await asleep.verify()


async def test_a_snapshot_discarded_while_the_hash_is_taken_gives_none(
    asleep: Asleep, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asleep.sleep()
    reading, go_on = threading.Event(), threading.Event()

    def slow(fd: int, *, check: Callable[[], None]) -> str:
        reading.set()
        wait()
        return "0" * 64

    def wait() -> None:
        assert go_on.wait(10)

    monkeypatch.setattr(memory_file, "sha256_of", slow)
    hashing = asyncio.create_task(asleep.snapshots.hash_memory(REF, 1))
    await asyncio.to_thread(reading.wait, 10)
    await asleep.snapshots.delete_all(REF)
    go_on.set()

    assert await hashing is None


async def test_after_close_no_hash_is_taken(asleep: Asleep) -> None:
    await asleep.sleep()
    asleep.snapshots.close()

    assert await asleep.snapshots.hash_memory(REF, 1) is None


# -- Wake -----------------------------------------------------------------------------------------


async def test_the_jail_gets_links_it_can_read_and_not_write(asleep: Asleep) -> None:
    await asleep.sleep()
    info = await asleep.snapshots.verify(REF, 1)
    jail = await asleep.jail(2)

    paths = await asleep.snapshots.link(jail, UID, info)

    assert paths == ("/woken/state", "/woken/mem")
    root = asleep.world.jails / "firecracker" / jail / "root"
    found = (root / "woken" / "mem").stat()
    assert found.st_ino == (asleep.directory / "mem").stat().st_ino
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, UID, 0o440)
    directory = (root / "woken").stat()
    assert (directory.st_uid, directory.st_gid, stat.S_IMODE(directory.st_mode)) == (0, UID, 0o750)


@pytest.mark.parametrize("order", ["settle first", "jail first", "killed, no settle"])
async def test_after_a_failed_wake_it_can_be_woken_also_without_a_hash(
    asleep: Asleep, order: str
) -> None:
    await asleep.sleep()
    info = await asleep.snapshots.verify(REF, 1)
    jail = await asleep.jail(2)
    await asleep.snapshots.link(jail, UID, info)
    if order == "settle first":
        await asleep.snapshots.restore_ownership(REF, 1)
    await asleep.jails.remove(jail)
    if order == "jail first":
        await asleep.snapshots.restore_ownership(REF, 1)

    later = new_snapshots(asleep.world)
    await later.verify(REF, 1)
    later.close()

    found = (asleep.directory / "mem").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o600)
    assert (asleep.directory / "mem").read_bytes() == asleep.memory
    os.utime(asleep.directory / "mem", ns=(0, found.st_mtime_ns))
    with pytest.raises(HostFault):
        await asleep.verify()


async def test_a_discard_leaves_the_memory_of_a_running_vm_alone(asleep: Asleep) -> None:
    await asleep.sleep()
    info = await asleep.snapshots.verify(REF, 1)
    jail = await asleep.jail(2)
    await asleep.snapshots.link(jail, UID, info)
    woken = asleep.world.jails / "firecracker" / jail / "root" / "woken" / "mem"
    with woken.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)

        await asleep.snapshots.delete_all(REF)
        await asleep.snapshots.begin_write(jail, UID)

        assert memory[:] == asleep.memory
        memory.close()
        assert not asleep.directory.exists()
        assert os.fstat(file.fileno()).st_nlink == 1

        await asleep.jails.remove(jail)
        assert os.fstat(file.fileno()).st_blocks == 0


async def test_a_deletion_frees_the_blocks_even_of_a_file_that_is_open(
    asleep: Asleep,
) -> None:
    await asleep.sleep()
    with (asleep.directory / "mem").open("rb") as file:
        await asleep.snapshots.delete_all(REF)
        await asleep.snapshots.delete_all(REF)

        assert os.fstat(file.fileno()).st_blocks == 0
    assert asleep.on_disk() == []
    assert await asleep.snapshots.read(REF) is None


async def test_discarded_memory_has_no_name_and_then_no_blocks(asleep: Asleep) -> None:
    await asleep.sleep()
    with (asleep.directory / "mem").open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_blocks * 512

        discarded = await asleep.snapshots.discard(REF)

        assert asleep.on_disk() == []
        assert not asleep.directory.exists()
        assert await asleep.snapshots.read(REF) is None
        assert discarded.size_bytes == size_bytes
        await asyncio.wait_for(asyncio.gather(*discarded.freed), 10)
        assert os.fstat(file.fileno()).st_blocks == 0
    assert await asleep.snapshots.discard(REF) == Discarded()


async def test_the_memory_of_a_running_vm_is_not_discarded(asleep: Asleep) -> None:
    await asleep.sleep()
    jail = await asleep.jail(2)
    await asleep.snapshots.link(jail, UID, await asleep.snapshots.verify(REF, 1))

    assert await asleep.snapshots.discard(REF) == Discarded()

    woken = asleep.world.jails / "firecracker" / jail / "root" / "woken" / "mem"
    assert woken.read_bytes() == asleep.memory
    await asleep.jails.remove(jail)


async def test_older_snapshots_go_and_the_newest_stays(asleep: Asleep) -> None:
    await asleep.sleep()
    asleep.facts = replace(asleep.facts, number=2, launch=2)
    await asleep.jail(2)
    await asleep.sleep()

    await asleep.snapshots.discard(REF, below=2)

    assert asleep.on_disk() == [(2, True)]
    info = await asleep.snapshots.read(REF)
    assert info is not None
    assert info.number == 2


async def test_drives_of_a_guest_that_did_not_ack_are_kept(asleep: Asleep) -> None:
    asleep.facts = replace(asleep.facts, keep_drives=True)
    config = (asleep.root / "config.ext4").read_bytes()
    secrets = (asleep.root / "secrets" / "secrets.ext4").read_bytes()
    await asleep.sleep()

    info = await asleep.snapshots.verify(REF, 1)

    assert info.kept_config is not None
    assert info.kept_secrets is not None
    assert info.has_secrets
    assert Path(info.kept_config).read_bytes() == config
    assert Path(info.kept_secrets).read_bytes() == secrets
    assert (len(config), len(secrets)) == (CONFIG.size_bytes, SECRETS.size_bytes)
    assert stat.S_IMODE(os.stat(info.kept_secrets).st_mode) == 0o600
    flip(Path(info.kept_config), 5000)
    with pytest.raises(HostFault, match=r"config\.ext4"):
        await asleep.verify()


async def test_a_wake_leaves_no_secret_on_the_disk(asleep: Asleep) -> None:
    asleep.facts = replace(asleep.facts, keep_drives=True)
    await asleep.sleep()
    info = await asleep.snapshots.read(REF)
    assert info is not None
    assert info.kept_secrets is not None
    watch = os.open(info.kept_secrets, os.O_RDONLY)

    for _ in range(2):
        await asleep.snapshots.mark_consumed(REF, 1)

    assert sorted(os.listdir(asleep.directory)) == ["consumed.json", "mem", "memory.json", "state"]
    assert not any(os.pread(watch, SECRETS.size_bytes, 0))
    os.close(watch)


async def test_another_file_system_is_named(asleep: Asleep, tmpfs: Path) -> None:
    await asleep.vmm_writes()
    elsewhere = Snapshots(
        data=str(asleep.world.data),
        state=str(tmpfs),
        jail_base=str(asleep.world.jails),
        cpu_model="x",
        kernel_release="y",
    )

    with pytest.raises(HostFault, match="different file systems"):
        await elsewhere.seal(asleep.jail_id, asleep.facts)
    elsewhere.close()


async def test_a_disk_that_fills_up_at_any_point_of_the_seal_leaves_nothing(
    tmp_path: Path,
) -> None:
    """On a small file system that is really full: the VM can be resumed, and sleep later."""
    there = tmp_path / "small"
    there.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", there], check=True)
    try:
        async with at_sleep(there) as asleep:
            asleep.facts = replace(asleep.facts, keep_drives=True)
            await asleep.vmm_writes()
            filler = there / "filler"
            filler.write_bytes(b"\1" * shutil.disk_usage(there).free)

            pages = 0
            for pages in range(0, 40, 4):
                os.truncate(filler, filler.stat().st_size - pages * 4096)
                try:
                    await asleep.snapshots.seal(asleep.jail_id, asleep.facts)
                except Exhausted:
                    assert asleep.on_disk() == []
                    await asleep.vmm_writes()
                else:
                    break

            assert pages > 0
            await asleep.snapshots.publish(REF, 1)
            await asleep.verify()
    finally:
        subprocess.run(["umount", "-l", there], check=True)


async def test_the_versions_of_snapshots_without_a_record_are_found(asleep: Asleep) -> None:
    state = str(asleep.world.state)
    asleep.facts = replace(asleep.facts, vmm_version=f"v1.17.0-{'x' * 1000}")
    assert await published_versions(state, ()) == set()
    await asleep.sleep()

    assert await published_versions(state, ()) == {"1.17.0"}
    assert await published_versions(state, [REF]) == set()
    pool, revision = f"{REF.tenant_id}/{REF.pool_id}", asleep.facts.revision
    assert await sleeps_on(state, f"{pool}/{revision}", ())
    assert not await sleeps_on(state, f"{pool}/{revision}", [REF])
    assert not await sleeps_on(state, f"{pool}/another", ())
    assert not await sleeps_on(state, f"{REF.tenant_id}/other/{revision}", ())
    info = await asleep.snapshots.read(REF)
    assert info is not None
    assert info.vmm_version == "1.17.0"
    (asleep.directory / "manifest.json").write_bytes(b"{")
    assert await published_versions(state, ()) == {""}
    assert await sleeps_on(state, f"{pool}/another", ())  # perhaps
    (asleep.directory / "manifest.json").unlink()
    assert await published_versions(state, ()) == set()
