"""What is proved of a data disk that no record names: each fact, and what breaks it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handlers.claims.facts import DiskProof, missing, not_proven
from handlers.host.storage.data_disks import DataDisks
from handlers.host.storage.disk_ownership import write_mark
from handlers.specs import DataDiskSpec
from schemas import naming
from schemas.requests import InstanceRef
from tests.kernel.storage.store_host import REF, StoreHost, make_world

SPEC = DataDiskSpec(REF, 8, None)
OTHER = InstanceRef("acme", "web", "i-other")
ROOT = (0,)


@pytest.fixture
def world(tmp_path: Path) -> StoreHost:
    return make_world(tmp_path)


@pytest.fixture
def disks(world: StoreHost) -> DataDisks:
    return DataDisks(data=str(world.data), jail_base=str(world.jails))


def path_of(world: StoreHost) -> Path:
    return world.instance / "volumes" / "data.ext4"


def gaps(proof: DiskProof | None) -> dict[str, str]:
    assert proof is not None
    return {fact["fact"]: fact["found"] for fact in not_proven(proof.facts)}


async def test_a_disk_at_rest_that_hostd_made_is_proven(disks: DataDisks) -> None:
    made = await disks.ensure(SPEC)

    proof = await disks.prove(REF, ROOT)

    assert proof is not None
    assert (proof.identity, gaps(proof)) == (made.identity, {})
    assert [fact.name for fact in proof.facts] == [
        "file",
        "links",
        "owner",
        "mark",
        "inode",
        "size",
        "label",
        "use",
    ]


async def test_where_there_is_no_disk_there_is_nothing_to_prove(disks: DataDisks) -> None:
    assert await disks.prove(REF, ROOT) is None


def another_owner(path: Path) -> None:
    os.chown(path, 1234, 1234)


def without_mark(path: Path) -> None:
    shutil.copyfile(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


def marked_for_another(path: Path) -> None:
    with path.open("r+b") as file:
        write_mark(file.fileno(), OTHER, new=False)


def linked(path: Path) -> None:
    os.link(path, path.with_name("second"))


def cut(path: Path) -> None:
    os.truncate(path, (8 << 20) - 512)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def a_symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "fact", "found"),
    [
        (another_owner, "owner", "uid 1234, expected 0"),
        (without_mark, "mark", "no mark of hostd's"),
        (marked_for_another, "mark", f"marked for {OTHER}"),
        (linked, "links", "2 hard links, expected at most 1"),
        (cut, "size", "expected whole MiB"),
        (emptied, "size", "0 bytes"),
        (a_symlink, "file", "symlink"),
        (a_fifo, "file", "not a regular file"),
    ],
)
async def test_each_required_fact_is_found_missing(
    disks: DataDisks, world: StoreHost, damage: Callable[[Path], None], fact: str, found: str
) -> None:
    await disks.ensure(SPEC)
    damage(path_of(world))

    proof = await disks.prove(REF, ROOT)

    assert proof is not None
    assert fact in [each.name for each in missing(proof.facts)]
    assert found in gaps(proof)[fact]


async def test_a_guest_that_wrote_another_file_system_keeps_its_disk(
    disks: DataDisks, world: StoreHost
) -> None:
    await disks.ensure(SPEC)
    with path_of(world).open("r+b") as file:
        file.write(b"\0" * 4096)

    proof = await disks.prove(REF, ROOT)

    assert proof is not None
    assert (missing(proof.facts), list(gaps(proof))) == ([], ["label"])


async def test_a_copy_with_its_mark_is_a_restored_backup(
    disks: DataDisks, world: StoreHost
) -> None:
    made = await disks.ensure(SPEC)
    path = path_of(world)
    copied = ["cp", "--preserve=all", str(path), str(path.with_name("copy"))]
    subprocess.run(copied, check=True)
    path.with_name("copy").rename(path)

    proof = await disks.prove(REF, ROOT)

    assert proof is not None
    assert proof.identity is not None
    assert proof.identity.ino != made.identity.ino
    assert (missing(proof.facts), list(gaps(proof))) == ([], ["inode"])
    # Once it is recorded, it is used as any other.
    recorded = await disks.ensure(DataDiskSpec(REF, 8, proof.identity))
    assert recorded.identity == proof.identity


async def test_the_links_in_the_instances_own_jails_count(
    disks: DataDisks, world: StoreHost
) -> None:
    await disks.ensure(SPEC)
    root = world.jails / "firecracker" / naming.jail_id(REF, 3) / "root"
    root.mkdir(parents=True)
    os.link(path_of(world), root / "data.ext4")

    assert gaps(await disks.prove(REF, ROOT)) == {}


@contextmanager
def reader(path: Path) -> Generator[int]:
    """A process that has the file open."""
    program = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


async def test_a_disk_that_a_process_has_open_is_in_use(disks: DataDisks, world: StoreHost) -> None:
    await disks.ensure(SPEC)
    with reader(path_of(world)) as pid:
        assert f"open by process {pid}" in gaps(await disks.prove(REF, ROOT))["use"]
        assert gaps(await disks.prove(REF, ROOT, used_by=pid)) == {}
        with reader(path_of(world)) as second:
            found = gaps(await disks.prove(REF, ROOT, used_by=pid))["use"]
            assert f"open by process {second}, expected process {pid}" in found


async def test_a_disk_that_is_mounted_is_in_use(disks: DataDisks, world: StoreHost) -> None:
    await disks.ensure(SPEC)
    device = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", path_of(world)],
        check=False,
        capture_output=True,
        text=True,
    )
    if device.returncode:
        pytest.skip(f"no loop device here: {device.stderr}")
    try:
        assert "in the kernel" in gaps(await disks.prove(REF, ROOT))["use"]
    finally:
        subprocess.run(["losetup", "--detach", device.stdout.strip()], check=True)
    assert gaps(await disks.prove(REF, ROOT)) == {}
