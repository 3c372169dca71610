"""An imported revision is whole, hostd's own, and out of everybody's reach."""

import asyncio
import hashlib
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from handlers.errors import Exhausted, HostFault, Invalid, NotFound, Unavailable
from handlers.host.linux.rmtree import remove_path
from handlers.host.linux.sparse_copy import copy_sparse
from handlers.host.storage.artifacts import Artifacts
from handlers.specs import ArtifactSpec
from tests.kernel.storage.store_host import REVISION, StoreHost, give_to, make_world, write

SPEC = ArtifactSpec("acme", "web", REVISION)


@pytest.fixture
def world(tmp_path: Path) -> StoreHost:
    return make_world(tmp_path)


@pytest.fixture
def artifacts(world: StoreHost) -> Artifacts:
    return Artifacts(data=str(world.data), state=str(world.state))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_an_import_is_a_whole_read_only_copy(artifacts: Artifacts, world: StoreHost) -> None:
    found = await artifacts.ensure(SPEC)

    assert found.initrd is None
    for name, path in (("vmlinux", found.vmlinux), ("rootfs.ext4", found.rootfs)):
        assert Path(path).read_bytes() == (world.revision / name).read_bytes()
        assert found.sha256[name] == sha256(world.revision / name)
        at = os.stat(path)
        assert (at.st_uid, at.st_gid, stat.S_IMODE(at.st_mode)) == (0, 0, 0o444)
        assert at.st_ino != (world.revision / name).stat().st_ino
    assert os.stat(found.rootfs).st_blocks <= (world.revision / "rootfs.ext4").stat().st_blocks + 8


async def test_a_second_import_finds_the_first(artifacts: Artifacts, world: StoreHost) -> None:
    first, again = await asyncio.gather(artifacts.ensure(SPEC), artifacts.ensure(SPEC))
    (world.revision / "vmlinux").write_bytes(b"something else")

    assert first == again == await artifacts.ensure(SPEC)
    assert b"kernel" in Path(first.vmlinux).read_bytes()
    assert os.listdir(Path(first.vmlinux).parents[1]) == [SPEC.revision]


async def test_an_initrd_is_taken_along(artifacts: Artifacts, world: StoreHost) -> None:
    write(world.revision / "initrd", b"cpio")

    found = await artifacts.ensure(SPEC)

    assert found.initrd is not None
    assert Path(found.initrd).read_bytes() == b"cpio"


@pytest.mark.parametrize("name", ["vmlinux", "rootfs.ext4"])
async def test_a_missing_file_is_named_and_nothing_is_left(
    artifacts: Artifacts, world: StoreHost, name: str
) -> None:
    (world.revision / name).unlink()

    with pytest.raises(NotFound, match=f"{REVISION}/{name}"):
        await artifacts.ensure(SPEC)

    assert not await artifacts.exists(SPEC.key)
    assert list(world.state.rglob("*")) == [world.state / "artifacts"]


async def test_a_linked_kernel_is_refused(artifacts: Artifacts, world: StoreHost) -> None:
    (world.revision / "vmlinux").unlink()
    (world.revision / "vmlinux").symlink_to("/etc/shadow")

    with pytest.raises(Invalid, match="vmlinux is a symlink"):
        await artifacts.ensure(SPEC)


async def test_a_hard_link_to_another_users_file_is_refused(
    artifacts: Artifacts, world: StoreHost
) -> None:
    secret = write(world.top / "secret", b"of root")
    secret.chmod(0o600)
    give_to(world, 1234)
    (world.revision / "vmlinux").unlink()
    os.link(secret, world.revision / "vmlinux")

    with pytest.raises(Invalid, match="belongs to uid 0, expected uid 1234"):
        await artifacts.ensure(SPEC)


async def test_half_an_import_is_done_again(artifacts: Artifacts, world: StoreHost) -> None:
    directory = world.state / "artifacts" / "acme" / "web"
    write(directory / f".{REVISION}.part" / "vmlinux", b"half")
    write(directory / REVISION / "vmlinux", b"without facts")
    assert not await artifacts.imported(SPEC.key)

    found = await artifacts.ensure(SPEC)

    assert await artifacts.imported(SPEC.key)
    assert Path(found.vmlinux).read_bytes() == (world.revision / "vmlinux").read_bytes()
    assert [each.name for each in directory.iterdir()] == [REVISION]


async def test_a_damaged_import_is_a_fault_of_the_host(artifacts: Artifacts) -> None:
    found = await artifacts.ensure(SPEC)
    os.truncate(found.vmlinux, 3)

    with pytest.raises(HostFault, match="vmlinux"):
        await artifacts.ensure(SPEC)


async def test_removal_spares_what_is_in_use(world: StoreHost) -> None:
    used = {SPEC.key}
    artifacts = Artifacts(
        data=str(world.data), state=str(world.state), in_use=lambda key: key in used
    )
    await artifacts.ensure(SPEC)

    await artifacts.remove(SPEC.key)
    assert await artifacts.exists(SPEC.key)

    used.clear()
    await artifacts.remove(SPEC.key)
    await artifacts.remove(SPEC.key)
    assert not await artifacts.exists(SPEC.key)
    assert list((world.state / "artifacts").iterdir()) == []


async def test_removal_spares_what_a_sleeper_without_a_record_needs(world: StoreHost) -> None:
    needed = True

    async def asleep(key: str) -> bool:
        return needed and key == SPEC.key

    artifacts = Artifacts(data=str(world.data), state=str(world.state), asleep=asleep)
    await artifacts.ensure(SPEC)

    await artifacts.remove(SPEC.key)
    assert await artifacts.exists(SPEC.key)

    needed = False
    await artifacts.remove(SPEC.key)
    assert not await artifacts.exists(SPEC.key)


@pytest.mark.parametrize("key", ["acme/web", "acme/web/..", "acme/../x", "a/b/c/d", "acme/web/"])
async def test_a_key_never_becomes_another_path(artifacts: Artifacts, key: str) -> None:
    with pytest.raises(Invalid):
        await artifacts.remove(key)


async def test_a_full_disk_is_exhausted_and_leaves_nothing(world: StoreHost, tmpfs: Path) -> None:
    with (world.revision / "rootfs.ext4").open("r+b") as rootfs:
        rootfs.write(os.urandom(2 << 20))
    artifacts = Artifacts(data=str(world.data), state=str(tmpfs))

    with pytest.raises(Exhausted):
        await artifacts.ensure(SPEC)

    assert not await artifacts.exists(SPEC.key)
    assert [each for each in tmpfs.rglob("*") if each.is_file()] == []


def test_blocks_are_shared_where_the_file_system_can(tmp_path: Path) -> None:
    """On XFS made for it: a copy takes no room and no time."""
    image = tmp_path / "xfs.img"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    there = tmp_path / "xfs"
    there.mkdir()
    if shutil.which("mkfs.xfs") is None and not os.environ.get("CI"):
        pytest.skip("needs mkfs.xfs: apt-get install xfsprogs")
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    try:
        subprocess.run(["mount", "-o", "loop", image, there], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel mounts no XFS from a loop device: {error.stderr!r}")
    try:
        (there / "a").write_bytes(os.urandom(32 << 20))
        source = os.open(there / "a", os.O_RDONLY)
        target = os.open(there / "b", os.O_RDWR | os.O_CREAT)
        os.sync()
        before = os.statvfs(there).f_bfree
        copy_sparse(source, target)
        os.fsync(target)
        used = (before - os.statvfs(there).f_bfree) * os.statvfs(there).f_frsize
        os.close(source)
        os.close(target)

        assert (there / "b").read_bytes() == (there / "a").read_bytes()
        assert used < 1 << 20
    finally:
        subprocess.run(["umount", there], check=True)


def with_hole(path: Path, size_bytes: int) -> None:
    """The file keeps its data and grows by a hole."""
    os.truncate(path, size_bytes)


async def test_a_file_larger_than_the_limit_is_refused_before_anything_is_made(
    world: StoreHost,
) -> None:
    artifacts = Artifacts(data=str(world.data), state=str(world.state), max_mib=64)
    with_hole(world.revision / "rootfs.ext4", 8 << 40)

    for attempt in (artifacts.ensure, artifacts.size_of_import):
        with pytest.raises(Invalid, match="expected at most 64 MiB") as refused:
            await attempt(SPEC)

        assert str(refused.value.path).endswith("rootfs.ext4")
    assert list(world.state.rglob("*")) == [world.state / "artifacts"]


async def test_a_hole_is_neither_read_nor_copied(artifacts: Artifacts, world: StoreHost) -> None:
    rootfs = world.revision / "rootfs.ext4"
    data_bytes = rootfs.stat().st_blocks * 512
    with_hole(rootfs, 2 << 30)

    found = await artifacts.ensure(SPEC)

    assert os.stat(found.rootfs).st_size == 2 << 30
    assert os.stat(found.rootfs).st_blocks * 512 <= data_bytes + 4096
    assert artifacts.copied_bytes <= data_bytes + (world.revision / "vmlinux").stat().st_size + 8192
    assert await artifacts.size_of_import(SPEC) <= data_bytes + (2 << 20)


async def test_a_cancelled_import_ends_and_leaves_nothing(
    artifacts: Artifacts, world: StoreHost
) -> None:
    with_hole(world.revision / "rootfs.ext4", 60 << 30)  # a minute of hashing
    task = asyncio.create_task(artifacts.ensure(SPEC))
    part = world.state / "artifacts" / "acme" / "web" / f".{REVISION}.part"
    async with asyncio.timeout(20):
        while not part.exists():
            await asyncio.sleep(0)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert list(world.state.rglob("*")) == [world.state / "artifacts"]


async def test_an_import_holds_up_no_removal_and_no_other_import(
    artifacts: Artifacts, world: StoreHost
) -> None:
    small = ArtifactSpec("acme", "web", "small")
    shutil.copytree(world.revision, world.revision.with_name("small"))
    with_hole(world.revision / "rootfs.ext4", 60 << 30)
    task = asyncio.create_task(artifacts.ensure(SPEC))
    part = world.state / "artifacts" / "acme" / "web" / f".{REVISION}.part"
    async with asyncio.timeout(20):
        while not part.exists():
            await asyncio.sleep(0)

        await artifacts.ensure(small)
        await artifacts.remove(small.key)

    assert not task.done()
    assert part.exists()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@dataclass
class HeldRemoval:
    """`remove_path`, which stops once half of a revision is gone."""

    half: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __call__(self, path: str) -> None:
        if os.path.exists(f"{path}/rootfs.ext4"):
            os.unlink(f"{path}/rootfs.ext4")
            self.half.set()
            assert self.go_on.wait(20)
        remove_path(path)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldRemoval]:
    removal = HeldRemoval()
    monkeypatch.setattr("handlers.host.storage.artifacts.remove_path", removal)
    yield removal
    removal.go_on.set()


async def test_a_revision_that_is_being_removed_is_imported_again(
    artifacts: Artifacts, held: HeldRemoval
) -> None:
    await artifacts.ensure(SPEC)
    removal = asyncio.create_task(artifacts.remove(SPEC.key))
    assert await asyncio.to_thread(held.half.wait, 20)

    asked = asyncio.create_task(artifacts.ensure(SPEC))
    await asyncio.sleep(0)
    held.go_on.set()

    found = await asked
    await removal
    assert Path(found.rootfs).exists()


async def test_half_a_removal_is_no_import(artifacts: Artifacts, held: HeldRemoval) -> None:
    """The worker may be killed in the middle of it."""
    await artifacts.ensure(SPEC)
    removal = asyncio.create_task(artifacts.remove(SPEC.key))
    assert await asyncio.to_thread(held.half.wait, 20)

    next_workers = Artifacts(data=artifacts._data, state=os.path.dirname(artifacts._base))
    found = await next_workers.ensure(SPEC)

    assert Path(found.rootfs).exists()
    held.go_on.set()
    await removal


async def test_an_import_that_grows_beyond_what_was_admitted_ends(
    artifacts: Artifacts, world: StoreHost
) -> None:
    (world.revision / "rootfs.ext4").write_bytes(os.urandom(40 << 20))

    with pytest.raises(Unavailable, match="grew while it was imported"):
        await artifacts.ensure(replace(SPEC, admitted_bytes=1 << 20))

    assert list(world.state.rglob("*")) == [world.state / "artifacts"]
