"""A jail is complete or absent, and can be removed whatever its VMM did to it."""

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from handlers.errors import Conflict, Failure, HostFault, Invalid
from handlers.host.jail import secrets_tmpfs
from handlers.host.jail.jails import Jails
from handlers.host.jail.layout import JailLayout, JailMetadata, launched_versions
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
from handlers.host.storage.drive_images import CONFIG, SECRETS
from handlers.jail_names import METADATA
from handlers.specs import ArtifactSpec, DataDiskSpec, JailFile, JailSpec
from schemas import naming
from schemas.records import InstanceRecord, Status
from tests.kernel.storage.store_host import REF, REVISION, StoreHost, make_world, write

UID = 2_000_000_007
JAIL = naming.jail_id(REF, 1)
LOG_BYTES = 64 << 10


@dataclass
class Ready:
    """An instance with its revision imported and its disk made, about to be jailed."""

    world: StoreHost
    jails: Jails
    disks: DataDisks
    spec: JailSpec

    @property
    def root(self) -> Path:
        return self.world.jails / "firecracker" / JAIL / "root"

    @property
    def disk(self) -> Path:
        return self.world.instance / "volumes" / "data.ext4"


def new_jails(world: StoreHost) -> Jails:
    return Jails(
        data=str(world.data),
        state=str(world.state),
        jail_base=str(world.jails),
        log_bytes=LOG_BYTES,
    )


@pytest.fixture
async def ready(tmp_path: Path) -> AsyncIterator[Ready]:
    world = make_world(tmp_path)
    artifact = await Artifacts(data=str(world.data), state=str(world.state)).ensure(
        ArtifactSpec("acme", "web", REVISION)
    )
    disks = DataDisks(data=str(world.data), jail_base=str(world.jails))
    disk = await disks.ensure(DataDiskSpec(REF, 8, None))
    spec = JailSpec(
        ref=REF,
        jail_id=JAIL,
        uid=UID,
        files=(
            JailFile("vmlinux", artifact.vmlinux),
            JailFile("rootfs.ext4", artifact.rootfs),
            JailFile("data.ext4", disk.path, disk.identity),
        ),
        config=b'{"vcpus": 1}',
        secrets=b'{"key": "hush"}',
        serial=True,
    )
    jails = new_jails(world)
    yield Ready(world, jails, disks, spec)
    for jail in await jails.list_ids():
        await jails.remove(jail)
    assert str(world.jails) not in Path("/proc/mounts").read_text()


def as_jailed(*command: str, inside: Path) -> None:
    """What the VMM's uid can do in its directory."""

    def become() -> None:
        os.chdir(inside)
        os.chroot(".")
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)

    pid = os.fork()
    if pid == 0:
        try:
            become()
            for each in command:
                exec(each, {"os": os})
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


async def test_a_jail_has_hard_links_log_and_drives(ready: Ready) -> None:
    jail = await ready.jails.ensure(ready.spec)

    assert jail.root == str(ready.root)
    assert (jail.has_config, jail.has_secrets) == (True, True)
    assert await ready.jails.exists(JAIL)
    found = {name: (ready.root / name).stat() for name in sorted(os.listdir(ready.root))}
    modes = {name: (of.st_uid, stat.S_IMODE(of.st_mode)) for name, of in found.items()}
    assert modes == {
        "config.ext4": (0, 0o444),
        "data.ext4": (UID, 0o600),
        "log": (UID, 0o600),
        "rootfs.ext4": (0, 0o444),
        "secrets": (UID, 0o700),
        "serial": (UID, 0o600),
        "vmlinux": (0, 0o444),
    }
    assert (ready.root.stat().st_uid, stat.S_IMODE(ready.root.stat().st_mode)) == (UID, 0o700)
    assert (ready.root / "vmlinux").stat().st_ino == Path(ready.spec.files[0].source).stat().st_ino
    assert (ready.root / "data.ext4").stat().st_ino == ready.disk.stat().st_ino
    assert (ready.root / "config.ext4").stat().st_size == CONFIG.size_bytes
    assert stat.S_IMODE(ready.root.parent.stat().st_mode) == 0o700


async def test_the_directory_of_all_jails_is_marked_before_the_first_one(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[int] = []
    monkeypatch.setattr("handlers.host.jail.layout.spread_subdirectories", marked.append)

    for _ in range(2):
        await ready.jails.ensure(ready.spec)

    assert len(marked) == 1


async def test_secrets_are_on_a_bounded_tmpfs_of_the_uid(ready: Ready) -> None:
    await ready.jails.ensure(ready.spec)

    mounts = Path("/proc/mounts").read_text().splitlines()
    (mount,) = [line.split() for line in mounts if str(ready.root) in line]
    assert mount[1:3] == [f"{ready.root}/secrets", "tmpfs"]
    options = set(mount[3].split(","))
    assert {"nosuid", "nodev", "noexec", "mode=700", f"uid={UID}", "nr_inodes=8"} <= options
    image = ready.root / "secrets" / "secrets.ext4"
    assert (image.stat().st_uid, stat.S_IMODE(image.stat().st_mode)) == (UID, 0o400)
    assert image.stat().st_size == SECRETS.size_bytes
    assert image.read_bytes().count(b"hush") == 1
    elsewhere = [each for each in ready.world.top.rglob("*") if each.is_file() and each != image]
    assert [each for each in elsewhere if b"hush" in each.read_bytes()] == []


async def test_ensure_of_an_existing_jail_changes_nothing(ready: Ready) -> None:
    first = await ready.jails.ensure(ready.spec)
    inode = (ready.root / "config.ext4").stat().st_ino

    assert await ready.jails.ensure(ready.spec) == first
    assert await new_jails(ready.world).ensure(ready.spec) == first

    assert (ready.root / "config.ext4").stat().st_ino == inode


async def test_a_jail_of_another_uid_is_a_conflict(ready: Ready) -> None:
    await ready.jails.ensure(ready.spec)

    with pytest.raises(Conflict):
        await ready.jails.ensure(replace(ready.spec, uid=UID + 1))


async def test_removal_gives_the_disk_back_and_leaves_nothing(ready: Ready) -> None:
    await ready.jails.ensure(ready.spec)
    (ready.root / "log").write_bytes(b"a line\n")

    await ready.jails.remove(JAIL)
    await ready.jails.remove(JAIL)

    assert not await ready.jails.exists(JAIL)
    assert await ready.jails.list_ids() == []
    found = ready.disk.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o600)
    assert found.st_nlink == 1
    assert str(ready.root) not in Path("/proc/mounts").read_text()
    assert await ready.jails.read_log(REF, 1) == b"a line\n"


async def test_removal_withstands_what_a_vmm_can_do_to_its_directory(ready: Ready) -> None:
    await ready.jails.ensure(ready.spec)
    outside = write(ready.world.top / "outside" / "file", b"untouched")
    kernel = Path(ready.spec.files[0].source).read_bytes()
    as_jailed(
        "os.rename('data.ext4', 'x'); os.link('x', 'y'); os.chmod('x', 0o777)",
        f"os.symlink('{outside.parent}', 'data.ext4'); os.rename('log', 'l')",
        "os.rename('vmlinux', 'log'); os.mkfifo('config')",
        "[(os.mkdir('d'), os.chdir('d')) for _ in range(300)]; os.mkdir('/snap')",
        "os.symlink('/etc/passwd', '/snap/mem'); os.mkfifo('/snap/state')",
        inside=ready.root,
    )

    async with asyncio.timeout(10):
        await ready.jails.bound_logs()
        assert await ready.jails.read_log(REF, 1) == b""
        await ready.jails.remove(JAIL)

    assert not ready.root.parent.exists()
    assert outside.read_bytes() == b"untouched"
    assert Path(ready.spec.files[0].source).read_bytes() == kernel
    found = ready.disk.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode), found.st_nlink) == (0, 0o600, 1)


async def test_a_log_is_bounded_and_keeps_its_newest_lines(ready: Ready) -> None:
    await ready.jails.ensure(ready.spec)
    with (ready.root / "log").open("r+b") as log:
        for number in range(100_000):
            log.write(b"line %06d\n" % number)
        log.flush()

        assert await ready.jails.bound_logs() > 0

        assert os.fstat(log.fileno()).st_blocks * 512 <= LOG_BYTES + 8192
        log.write(b"the last line\n")
    kept = await ready.jails.read_log(REF)
    assert kept.endswith(b"line 099999\nthe last line\n")
    assert len(kept) <= LOG_BYTES
    assert await ready.jails.bound_logs() == 0


async def test_a_shared_kernel_in_place_of_the_log_is_not_cut(ready: Ready) -> None:
    await ready.jails.ensure(ready.spec)
    kernel = Path(ready.spec.files[1].source)
    before = kernel.read_bytes()
    as_jailed("os.unlink('log'); os.rename('rootfs.ext4', 'log')", inside=ready.root)

    await ready.jails.bound_logs()

    assert kernel.read_bytes() == before


async def test_the_last_three_launches_are_kept(ready: Ready) -> None:
    for launch in range(1, 6):
        spec = replace(ready.spec, jail_id=naming.jail_id(REF, launch), secrets=None)
        jail = await ready.jails.ensure(spec)
        Path(jail.root, "log").write_bytes(b"launch %d" % launch)
        await ready.jails.remove(spec.jail_id)

    kept = [await ready.jails.read_log(REF, launch) for launch in range(1, 6)]
    assert kept == [b"", b"", b"launch 3", b"launch 4", b"launch 5"]
    assert await ready.jails.read_log(REF) == b"launch 5"


@pytest.mark.parametrize("at", ["_link", "_make_config", "mount_tmpfs", "os.chown"])
async def test_a_failed_ensure_leaves_nothing(
    ready: Ready, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    if at == "os.chown":
        monkeypatch.setattr(os, "chown", fail)
    elif at == "mount_tmpfs":
        monkeypatch.setattr(secrets_tmpfs, at, fail)
    else:
        monkeypatch.setattr(Jails, at, fail)
    with pytest.raises(Failure, match="No space left"):
        await ready.jails.ensure(ready.spec)

    assert await ready.jails.list_ids() == []
    assert (ready.disk.stat().st_uid, ready.disk.stat().st_nlink) == (0, 1)
    assert str(ready.root) not in Path("/proc/mounts").read_text()


class Killed(BaseException):
    """Simulates kill -9: no clean-up of hostd runs."""


async def test_an_incomplete_jail_of_a_killed_worker_is_remade(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    monkeypatch.setattr(JailLayout, "write_metadata", killed)
    with pytest.raises(Killed):
        ready.jails._ensure(ready.spec)
    monkeypatch.undo()
    real = JailLayout.write_metadata

    def killed_at_the_end(layout: JailLayout, jail_id: str, metadata: JailMetadata) -> None:
        if metadata.complete:
            raise Killed
        real(layout, jail_id, metadata)

    monkeypatch.setattr(JailLayout, "write_metadata", killed_at_the_end)
    with pytest.raises(Killed):
        ready.jails._ensure(ready.spec)
    monkeypatch.undo()
    assert await ready.jails.exists(JAIL)
    assert str(ready.root) in Path("/proc/mounts").read_text()

    await new_jails(ready.world).ensure(ready.spec)

    assert Path("/proc/mounts").read_text().count(str(ready.root)) == 1
    assert (ready.root / "data.ext4").stat().st_uid == UID
    assert ready.disk.stat().st_nlink == 2


async def test_an_incomplete_jail_can_be_removed_and_the_disk_is_roots_again(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    monkeypatch.setattr(secrets_tmpfs, "mount_tmpfs", killed)
    with pytest.raises(Killed):
        ready.jails._ensure(ready.spec)
    assert ready.disk.stat().st_uid == UID

    await ready.jails.remove(JAIL)

    assert (ready.disk.stat().st_uid, ready.disk.stat().st_nlink) == (0, 1)


async def test_a_disk_is_roots_again_without_its_name_and_the_metadata(ready: Ready) -> None:
    await ready.jails.ensure(ready.spec)
    elsewhere = ready.disk.rename(ready.disk.with_name("moved"))
    (ready.root.parent / METADATA).write_bytes(b"damaged")

    await ready.jails.remove(JAIL)

    assert (elsewhere.stat().st_uid, elsewhere.stat().st_nlink) == (0, 1)


async def test_a_stale_jail_does_not_take_the_disk_from_a_newer_one(ready: Ready) -> None:
    await ready.jails.ensure(replace(ready.spec, secrets=None))
    newer = replace(ready.spec, jail_id=naming.jail_id(REF, 2), uid=UID + 1, secrets=None)
    await ready.jails.ensure(newer)

    await ready.jails.remove(JAIL)
    assert ready.disk.stat().st_uid == UID + 1

    await ready.jails.remove(newer.jail_id)
    assert ready.disk.stat().st_uid == 0


async def test_a_disk_replaced_after_its_check_is_refused(ready: Ready) -> None:
    shadow = write(ready.world.top / "shadow", b"of root")
    ready.disk.rename(ready.disk.with_name("moved"))
    for plant in (os.link, os.symlink):
        plant(shadow, ready.disk)
        with pytest.raises(Invalid):
            await ready.jails.ensure(ready.spec)
        ready.disk.unlink()

    assert shadow.stat().st_uid == 0
    assert shadow.stat().st_nlink == 1


async def test_a_source_on_another_file_system_is_a_host_fault(ready: Ready, tmpfs: Path) -> None:
    jails = Jails(
        data=str(ready.world.data), state=str(ready.world.state), jail_base=str(tmpfs / "jails")
    )

    with pytest.raises(HostFault, match="different file systems"):
        await jails.ensure(replace(ready.spec, secrets=None))

    assert await jails.list_ids() == []


async def test_images_kept_with_a_snapshot_are_used_unchanged(ready: Ready) -> None:
    config = write(ready.world.state / "kept" / "config.ext4", b"C" * 5000)
    secrets = write(ready.world.state / "kept" / "secrets.ext4", b"S" * 5000)
    for image in (config, secrets):
        image.chmod(0o600)  # as a snapshot keeps them
    spec = replace(
        ready.spec,
        config=None,
        secrets=None,
        kept_config=str(config),
        kept_secrets=str(secrets),
    )

    jail = await ready.jails.ensure(spec)

    assert (jail.has_config, jail.has_secrets) == (True, True)
    assert (ready.root / "config.ext4").read_bytes() == b"C" * 5000
    assert stat.S_IMODE((ready.root / "config.ext4").stat().st_mode) == 0o444
    assert (ready.root / "secrets" / "secrets.ext4").read_bytes() == b"S" * 5000
    await ready.jails.remove(JAIL)
    assert (config.read_bytes(), secrets.read_bytes()) == (b"C" * 5000, b"S" * 5000)


async def test_the_metadata_beside_a_jail_says_whose_it_is(ready: Ready) -> None:
    await ready.jails.ensure(ready.spec)

    layout = JailLayout(str(ready.world.jails))
    metadata = layout.read_metadata(JAIL)
    assert metadata is not None
    assert (metadata.ref, metadata.uid, metadata.launch) == (REF, UID, 1)
    path = ready.root.parent / METADATA
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (0, 0o600)
    json.loads(path.read_text())
    path.write_bytes(path.read_bytes()[:40])
    assert layout.read_metadata(JAIL) is None


@pytest.mark.parametrize("key", ["..", "a/b", "", "a" * 65, "é", "x\n"])
async def test_a_jail_id_never_becomes_another_path(ready: Ready, key: str) -> None:
    with pytest.raises(Invalid):
        await ready.jails.remove(key)


def test_versions_of_jails_without_a_record_are_known(tmp_path: Path) -> None:
    layout = JailLayout(str(tmp_path))
    record = InstanceRecord(ref=REF, status=Status.RUNNING, since_ms=1, vmm_version="1.15.0")
    metadata = JailMetadata(ref=REF, uid=UID, launch=1, complete=True, record=record)
    os.makedirs(layout.directory(JAIL))

    unread = launched_versions(str(tmp_path), [])
    layout.write_metadata(JAIL, metadata)

    assert unread == {""}
    assert launched_versions(str(tmp_path), []) == {"1.15.0"}
    assert launched_versions(str(tmp_path), [REF]) == set()


async def test_the_log_of_a_jail_that_was_made_again_is_bounded_too(ready: Ready) -> None:
    await ready.jails.ensure(ready.spec)
    with (ready.root / "log").open("rb"):  # so that the next one has another inode
        await ready.jails.bound_logs()
        await ready.jails.remove(JAIL)
        await ready.jails.ensure(ready.spec)
    (ready.root / "log").write_bytes(b"x" * (4 * LOG_BYTES))

    freed = [await ready.jails.bound_logs(), await ready.jails.bound_logs()]

    assert sum(freed) > 0
