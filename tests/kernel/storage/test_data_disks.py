"""The data disk is hostd's own making, known by more than its name, and gone when wiped."""

import errno
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from handlers.errors import Exhausted, HostFault, Invalid, NotFound
from handlers.host.linux.syscalls import punch_hole
from handlers.host.storage import wipe
from handlers.host.storage.data_disks import DataDisks
from handlers.specs import DataDiskSpec
from schemas import naming
from schemas.requests import InstanceRef
from tests.kernel.storage.store_host import REF, StoreHost, make_world, write

SPEC = DataDiskSpec(REF, 8, None)
KEY = str(REF)
NEIGHBOUR = InstanceRef("acme", "web", "i-neighbour")


@pytest.fixture
def world(tmp_path: Path) -> StoreHost:
    return make_world(tmp_path)


@pytest.fixture
def disks(world: StoreHost) -> DataDisks:
    return DataDisks(data=str(world.data), jail_base=str(world.jails))


def path_of(world: StoreHost) -> Path:
    return world.instance / "volumes" / "data.ext4"


async def test_a_new_disk_is_a_sound_labelled_file_of_roots(
    disks: DataDisks, world: StoreHost
) -> None:
    assert not await disks.exists(KEY)
    os.chown(world.instance, 1234, 1234)

    disk = await disks.ensure(SPEC)

    found = path_of(world).stat()
    assert disk.path == str(path_of(world))
    assert (disk.identity.dev, disk.identity.ino) == (found.st_dev, found.st_ino)
    assert disk.identity.size_bytes == found.st_size == 8 << 20
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o600)
    assert path_of(world).parent.stat().st_uid == 1234
    subprocess.run(["e2fsck", "-fn", disk.path], check=True, capture_output=True)
    label = subprocess.run(["e2label", disk.path], check=True, capture_output=True, text=True)
    assert label.stdout.strip() == "mvm-data"


async def test_the_known_disk_is_found_and_never_resized(disks: DataDisks) -> None:
    disk = await disks.ensure(SPEC)

    again = await disks.ensure(replace(SPEC, size_mib=64, known=disk.identity))

    assert again == disk


async def test_a_marked_disk_is_accepted_with_another_device_number(disks: DataDisks) -> None:
    disk = await disks.ensure(SPEC)
    before = msgspec.structs.replace(disk.identity, dev=disk.identity.dev + 1)

    assert await disks.ensure(replace(SPEC, known=before)) == disk


async def test_a_creation_cut_short_before_its_record_goes_on(disks: DataDisks) -> None:
    first = await disks.ensure(SPEC)

    assert await disks.ensure(SPEC) == first


async def test_a_file_that_hostd_did_not_make_is_refused_and_stays(
    disks: DataDisks, world: StoreHost
) -> None:
    write(path_of(world), b"\0" * 4096)

    with pytest.raises(Invalid, match=r"not created by hostd.*docs/operations\.md"):
        await disks.ensure(SPEC)
    for refuse in (disks.check_wipe, disks.wipe):
        with pytest.raises(Invalid, match="not created by hostd"):
            await refuse(REF, None)
    await disks.remove(KEY)

    assert path_of(world).exists()


async def test_a_disk_with_the_content_of_another_is_accepted(
    disks: DataDisks, world: StoreHost
) -> None:
    disk = await disks.ensure(SPEC)
    other = write(world.top / "rescued.ext4", os.urandom(1 << 20))

    # As docs/operations.md says, since another file in its place is refused.
    copy = ["dd", f"if={other}", f"of={path_of(world)}", "bs=64K", "conv=notrunc,fsync"]
    subprocess.run(copy, check=True, capture_output=True, timeout=60)

    assert await disks.ensure(replace(SPEC, known=disk.identity)) == disk
    assert path_of(world).read_bytes().startswith(other.read_bytes())


async def test_an_exchanged_disk_is_refused(disks: DataDisks, world: StoreHost) -> None:
    disk = await disks.ensure(SPEC)
    path_of(world).rename(world.instance / "old")
    write(path_of(world), b"\0" * (8 << 20))

    with pytest.raises(Invalid, match=r"inode mismatch: expected .* found "):
        await disks.ensure(replace(SPEC, known=disk.identity))


async def test_a_cut_disk_is_refused(disks: DataDisks, world: StoreHost) -> None:
    disk = await disks.ensure(SPEC)
    os.truncate(path_of(world), 4096)

    with pytest.raises(Invalid, match="inode mismatch"):
        await disks.ensure(replace(SPEC, known=disk.identity))


async def test_a_recorded_disk_that_is_missing_is_not_created_again(
    disks: DataDisks, world: StoreHost
) -> None:
    disk = await disks.ensure(SPEC)
    path_of(world).unlink()

    with pytest.raises(NotFound, match="is missing: expected device"):
        await disks.ensure(replace(SPEC, known=disk.identity))


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "linked directory"])
async def test_what_is_no_file_is_refused(disks: DataDisks, world: StoreHost, kind: str) -> None:
    disk = await disks.ensure(SPEC)
    path = path_of(world)
    path.rename(world.top / "moved")
    match kind:
        case "link":
            path.symlink_to(world.top / "moved")
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case _:
            path.parent.rmdir()
            (world.top / "elsewhere").mkdir()
            (world.top / "moved").rename(world.top / "elsewhere" / "data.ext4")
            path.parent.symlink_to(world.top / "elsewhere")

    for known in (None, disk.identity):
        with pytest.raises(Invalid, match=r"volumes"):
            await disks.ensure(replace(SPEC, known=known))
    for refuse in (disks.check_wipe, disks.wipe):
        with pytest.raises(Invalid):
            await refuse(REF, disk.identity)


async def test_several_names_are_refused_but_for_those_in_its_jails(
    disks: DataDisks, world: StoreHost
) -> None:
    disk = await disks.ensure(SPEC)
    known = replace(SPEC, known=disk.identity)
    jail = world.jails / "firecracker" / naming.jail_id(REF, 3) / "root"
    jail.mkdir(parents=True)
    os.link(path_of(world), jail / "data.ext4")
    assert await disks.ensure(known) == disk
    await disks.check_wipe(REF, disk.identity)

    os.link(path_of(world), world.instance / "second")
    with pytest.raises(Invalid, match="hard links"):
        await disks.ensure(known)
    for refuse in (disks.check_wipe, disks.wipe):
        with pytest.raises(Invalid, match="hard links"):
            await refuse(REF, disk.identity)


async def test_a_neighbours_disk_moved_here_is_not_wiped(
    disks: DataDisks, world: StoreHost
) -> None:
    neighbour = world.instance.with_name(NEIGHBOUR.instance_id)
    neighbour.mkdir()
    theirs = await disks.ensure(DataDiskSpec(NEIGHBOUR, 8, None))
    path_of(world).parent.mkdir()
    Path(theirs.path).rename(path_of(world))

    for known in (None, msgspec.structs.replace(theirs.identity, ino=1)):
        for refuse in (disks.check_wipe, disks.wipe):
            with pytest.raises(Invalid):
                await refuse(REF, known)
    with pytest.raises(Invalid):
        await disks.ensure(SPEC)
    await disks.remove(KEY)

    assert path_of(world).stat().st_ino == theirs.identity.ino


@pytest.mark.parametrize("hidden", ["disk", "volumes", "instance", "tenant"])
async def test_a_hidden_disk_is_not_reported_as_wiped(
    disks: DataDisks, world: StoreHost, hidden: str
) -> None:
    disk = await disks.ensure(SPEC)
    path = {
        "disk": path_of(world),
        "volumes": path_of(world).parent,
        "instance": world.instance,
        "tenant": world.tenant,
    }[hidden]
    path.rename(world.top / "hidden")

    with pytest.raises(Invalid, match=r"data\.ext4 is missing: expected device"):
        await disks.check_wipe(REF, disk.identity)
    with pytest.raises(HostFault, match=r"not wiped: .*data\.ext4 is missing"):
        await disks.wipe(REF, disk.identity)


async def test_another_disk_of_the_instance_is_not_wiped_for_the_recorded_one(
    disks: DataDisks, world: StoreHost
) -> None:
    recorded = await disks.ensure(SPEC)
    path_of(world).rename(world.instance / "hidden")
    await disks.ensure(SPEC)

    for refuse in (disks.check_wipe, disks.wipe):
        with pytest.raises(Invalid, match="inode mismatch"):
            await refuse(REF, recorded.identity)


async def test_an_undone_creation_leaves_nothing(disks: DataDisks, world: StoreHost) -> None:
    await disks.ensure(SPEC)

    await disks.remove(KEY)
    await disks.remove(KEY)

    assert not await disks.exists(KEY)
    assert os.listdir(world.instance / "volumes") == []


async def test_wiped_data_is_overwritten_then_freed_and_the_empty_file_stays(
    disks: DataDisks, world: StoreHost
) -> None:
    disk = await disks.ensure(SPEC)
    secret = os.urandom(3 << 20)
    with path_of(world).open("r+b") as file:
        file.seek(2 << 20)
        file.write(secret)
        file.flush()
        watch = os.dup(file.fileno())

    await disks.wipe(REF, disk.identity)
    await disks.wipe(REF, disk.identity)

    assert await disks.exists(KEY)
    assert not any(os.pread(watch, 8 << 20, 0))
    assert os.fstat(watch).st_blocks == 0
    os.close(watch)


async def test_the_overwrite_itself_reaches_every_block(tmp_path: Path) -> None:
    """Without the freeing, which would hide an overwrite that did nothing."""
    path = write(tmp_path / "disk", os.urandom((1 << 20) + 5))
    os.truncate(path, 8 << 20)
    fd = os.open(path, os.O_RDWR)
    blocks = os.fstat(fd).st_blocks

    def no_hole(fd: int, offset: int, length: int) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wipe, "punch_hole", no_hole)
        wipe.wipe(fd)

    assert not any(path.read_bytes())
    assert os.fstat(fd).st_blocks == blocks
    os.close(fd)


async def test_a_wipe_that_does_not_hold_is_a_fault_and_the_file_stays(
    disks: DataDisks, world: StoreHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await disks.ensure(SPEC)

    def ones(fd: int, size: int, at: int) -> bytes:
        return b"\1" * size

    monkeypatch.setattr(os, "pread", ones)

    with pytest.raises(HostFault, match="zeros"):
        await disks.wipe(REF, disk.identity)

    monkeypatch.undo()
    assert await disks.exists(KEY)


async def test_a_full_disk_is_exhausted_and_leaves_nothing(tmpfs: Path) -> None:
    world = StoreHost(tmpfs)
    write(world.instance / "instance.json", b"{}")
    write(tmpfs / "filling", os.urandom(700 << 10))
    disks = DataDisks(data=str(world.data), jail_base=str(world.jails))

    with pytest.raises((Exhausted, HostFault)) as caught:
        await disks.ensure(replace(SPEC, size_mib=2048))

    assert isinstance(caught.value, Exhausted), caught.value
    assert not await disks.exists(KEY)
    assert os.listdir(world.instance / "volumes") == []


async def test_a_missing_mkfs_is_a_fault_of_the_host(
    disks: DataDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.host.storage.mkfs.MKFS", "mkfs.nowhere")

    with pytest.raises(HostFault, match=r"mkfs\.nowhere"):
        await disks.ensure(SPEC)

    assert not await disks.exists(KEY)


async def test_no_instance_no_disk(disks: DataDisks, world: StoreHost) -> None:
    nobody = InstanceRef("acme", "web", "i-nobody")

    with pytest.raises(NotFound):
        await disks.ensure(replace(SPEC, ref=nobody))
    await disks.remove(str(nobody))
    await disks.check_wipe(nobody, None)
    await disks.wipe(nobody, None)


async def test_a_disk_is_allocated_at_its_nominal_size(disks: DataDisks, world: StoreHost) -> None:
    made = await disks.ensure(SPEC)

    found = os.stat(made.path)
    assert found.st_blocks * 512 >= found.st_size == SPEC.size_mib << 20
    assert await disks.unallocated_bytes(SPEC.ref) == 0


async def test_a_sparse_disk_is_allocated_at_a_start_and_left_alone_at_a_wake(
    disks: DataDisks, world: StoreHost
) -> None:
    made = await disks.ensure(SPEC)
    with open(made.path, "r+b") as file:
        punch_hole(file.fileno(), 1 << 20, 2 << 20)
    sparse = os.stat(made.path)
    assert 0 < await disks.unallocated_bytes(SPEC.ref) <= 2 << 20

    await disks.ensure(replace(SPEC, known=made.identity, asleep=True))
    assert os.stat(made.path).st_mtime_ns == sparse.st_mtime_ns
    assert os.stat(made.path).st_blocks == sparse.st_blocks

    await disks.ensure(replace(SPEC, known=made.identity))
    assert await disks.unallocated_bytes(SPEC.ref) == 0


async def test_an_absent_disk_lacks_nothing(disks: DataDisks, world: StoreHost) -> None:
    assert await disks.unallocated_bytes(SPEC.ref) == 0


async def test_a_size_beyond_the_file_system_is_the_pools_mistake(
    disks: DataDisks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_big(fd: int, length: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "ftruncate", too_big)

    with pytest.raises(Invalid, match="more than this file system allows") as caught:
        await disks.ensure(SPEC)

    assert caught.value.path == "pool.json: $.instance_resources.data_disk_mib"
