"""Below a tenant's directory only its owner's files are taken, and never one that hostd marked.

agentd may rename whatever lies in its directories, so a name says nothing about whose a file is.
"""

import ast
import ctypes
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from handlers.errors import Failure, Invalid, Unavailable
from handlers.host.jail.jails import Jails
from handlers.host.linux.sparse_copy import copy_sparse
from handlers.host.storage import artifacts as artifacts_module
from handlers.host.storage.agentd_files import SharedFiles
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
from handlers.specs import ArtifactSpec, DataDiskSpec, JailFile, JailSpec
from schemas import naming
from schemas.requests import InstanceRef
from tests.kernel.storage.store_host import REF, REVISION, StoreHost, give_to, make_world, write

AGENTD = 1234
STRANGER = 4321
UID = 2_000_000_007
ROOT = Path(__file__).parents[3]
RENAME_EXCHANGE = 2
AT_FDCWD = -100


@pytest.fixture
def world(tmp_path: Path) -> StoreHost:
    world = make_world(tmp_path)
    write(world.tenant / "secrets.json", b"{}")
    write(world.revision / "initrd", b"initrd")
    give_to(world, AGENTD)
    return world


def import_revision(world: StoreHost) -> Awaitable[object]:
    artifacts = Artifacts(data=str(world.data), state=str(world.state))
    return artifacts.ensure(ArtifactSpec("acme", "web", REVISION))


def shared(world: StoreHost) -> SharedFiles:
    return SharedFiles(str(world.data))


Read = Callable[[StoreHost], Awaitable[object]]
# Every file of agentd's that hostd reads: where it is, and what reads it.
READ: dict[str, tuple[Callable[[StoreHost], Path], Read]] = {
    "tenant.json": (lambda w: w.tenant / "tenant.json", lambda w: shared(w).tenant("acme")),
    "secrets.json": (lambda w: w.tenant / "secrets.json", lambda w: shared(w).secrets("acme")),
    "pool.json": (lambda w: w.pool / "pool.json", lambda w: shared(w).pool("acme", "web")),
    "instance.json": (
        lambda w: w.instance / "instance.json",
        lambda w: shared(w).instance(REF),
    ),
    "instance.json, updated": (
        lambda w: w.instance / "instance.json",
        lambda w: shared(w).update_instance(REF, {"status": "running"}),
    ),
    "current": (
        lambda w: w.pool / "artifacts" / "current",
        lambda w: shared(w).of_start(REF),
    ),
    "vmlinux": (lambda w: w.revision / "vmlinux", import_revision),
    "rootfs.ext4": (lambda w: w.revision / "rootfs.ext4", import_revision),
    "initrd": (lambda w: w.revision / "initrd", import_revision),
}


@pytest.mark.parametrize("name", READ)
async def test_the_owners_file_is_taken(world: StoreHost, name: str) -> None:
    _, read = READ[name]

    await read(world)


@pytest.mark.parametrize("uid", [0, STRANGER])
@pytest.mark.parametrize("name", READ)
async def test_another_users_file_is_refused_though_it_has_one_name(
    world: StoreHost, name: str, uid: int
) -> None:
    where, read = READ[name]
    path = where(world)
    os.lchown(path, uid, uid)
    assert path.lstat().st_nlink == 1

    with pytest.raises(Invalid, match=f"belongs to uid {uid}, expected uid {AGENTD}") as caught:
        await read(world)

    assert caught.value.path == str(path)


@pytest.mark.parametrize("name", [each for each in READ if each != "current"])
async def test_a_data_disk_is_refused_whoever_owns_it(world: StoreHost, name: str) -> None:
    where, read = READ[name]
    disks = DataDisks(data=str(world.data), jail_base=str(world.jails))
    disk = Path((await disks.ensure(DataDiskSpec(REF, 8, None))).path)
    os.chown(disk, AGENTD, AGENTD)
    disk.rename(where(world))

    with pytest.raises(Invalid, match="is a data disk"):
        await read(world)


async def test_another_tenants_disk_does_not_become_a_rootfs(world: StoreHost) -> None:
    """As it was found: agentd moves the disk of tenant A to tenant B's rootfs."""
    disks = DataDisks(data=str(world.data), jail_base=str(world.jails))
    other = world.data / "tenants" / "other" / "pools" / "p" / "instances" / "i"
    other.mkdir(parents=True)
    disk = await disks.ensure(DataDiskSpec(InstanceRef("other", "p", "i"), 8, None))
    Path(disk.path).rename(world.revision / "rootfs.ext4")

    with pytest.raises(Invalid, match=r"rootfs\.ext4 belongs to uid 0"):
        await import_revision(world)

    assert not [each for each in (world.state / "artifacts").rglob("*") if each.is_file()]


def test_only_a_data_disk_is_opened_whoever_owns_it() -> None:
    """`marked_file` leaves out the check of the owner: each caller checks mark or identity."""
    callers = {
        str(path.relative_to(ROOT))
        for package in ("handlers", "worker", "schemas")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "marked_file"
    }

    assert callers == {
        "handlers/host/jail/jails.py",
        "handlers/host/snapshot/sealer.py",
        "handlers/host/storage/data_disks.py",
    }


async def test_a_torn_import_is_seen_though_the_mtime_is_put_back(
    world: StoreHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    rootfs = world.revision / "rootfs.ext4"
    copy = copy_sparse

    def written_meanwhile(source: int, target: int, **options: Any) -> None:
        before = os.fstat(source)
        copy(source, target, **options)
        if before.st_size != rootfs.stat().st_size:
            return
        with rootfs.open("r+b") as file:
            file.write(b"torn")
        os.utime(rootfs, ns=(before.st_atime_ns, before.st_mtime_ns))

    monkeypatch.setattr(artifacts_module, "copy_sparse", written_meanwhile)

    with pytest.raises(Unavailable, match="changed while it was copied"):
        await import_revision(world)


async def test_a_disk_in_the_place_of_the_recorded_one_is_not_linked(world: StoreHost) -> None:
    """Both are hostd's, made for this instance: only the recorded one may be attached."""
    disks = DataDisks(data=str(world.data), jail_base=str(world.jails))
    hidden, recorded = await two_disks(world, disks)
    jails = new_jails(world)
    path = world.instance / "volumes" / "data.ext4"
    exchange(hidden, path)

    with pytest.raises(Invalid, match="inode mismatch"):
        await jails.ensure(spec_of(recorded))

    assert await jails.list_ids() == []
    exchange(hidden, path)
    await jails.ensure(spec_of(recorded))
    await jails.remove(naming.jail_id(REF, 1))


async def test_a_disk_exchanged_in_a_loop_is_never_attached(world: StoreHost) -> None:
    disks = DataDisks(data=str(world.data), jail_base=str(world.jails))
    hidden, recorded = await two_disks(world, disks)
    jails = new_jails(world)
    root = world.jails / "firecracker" / naming.jail_id(REF, 1) / "root"
    ended = threading.Event()

    def agentd() -> None:
        while not ended.is_set():
            exchange(hidden, world.instance / "volumes" / "data.ext4")

    thread = threading.Thread(target=agentd)
    thread.start()
    outcomes: set[int] = set()
    try:
        for _ in range(100):
            try:
                await jails.ensure(spec_of(recorded))
                outcomes.add((root / "data.ext4").stat().st_ino)
            except Failure:
                continue
            finally:
                await jails.remove(naming.jail_id(REF, 1))
    finally:
        ended.set()
        thread.join()

    assert outcomes <= {recorded.disk.ino if recorded.disk is not None else 0}


def new_jails(world: StoreHost) -> Jails:
    return Jails(data=str(world.data), state=str(world.state), jail_base=str(world.jails))


def spec_of(file: JailFile) -> JailSpec:
    return JailSpec(REF, naming.jail_id(REF, 1), UID, (file,), config=b"{}")


async def two_disks(world: StoreHost, disks: DataDisks) -> tuple[Path, JailFile]:
    """A disk that agentd hid before hostd made another, and the other, which is recorded."""
    hidden = Path((await disks.ensure(DataDiskSpec(REF, 8, None))).path)
    hidden = hidden.rename(world.instance / "hidden")
    disk = await disks.ensure(DataDiskSpec(REF, 8, None))
    return hidden, JailFile("data.ext4", disk.path, disk.identity)


def exchange(one: Path, other: Path) -> None:
    """Source: renameat2(2), RENAME_EXCHANGE."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    if done != 0:
        raise OSError(ctypes.get_errno(), "renameat2")
