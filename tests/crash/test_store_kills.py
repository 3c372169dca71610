"""kill -9 at every system call of the store: what comes after puts it right, whatever the spot.

A forked child does the work and kills itself at its n-th audited call, for n from 0 until it gets
to the end. Then a new "worker" goes on, as recovery would.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from handlers.errors import HostFault
from handlers.host.jail.jails import Jails
from handlers.host.linux.file_threads import CancelToken
from handlers.host.snapshot.discards import discard_dir, unname_dir
from handlers.host.snapshot.snapshots import Snapshots
from handlers.host.storage.agentd_files import SharedFiles
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
from handlers.host.storage.disk_ownership import identity_of
from handlers.host.storage.drive_images import CONFIG, SECRETS, SmallDrives
from handlers.specs import ArtifactSpec, DataDiskSpec, JailFile, JailSpec, SnapshotFacts
from schemas import naming
from schemas.records import DiskIdentity
from tests.kernel.storage.store_host import REF, REVISION, StoreHost, make_world

UID = 2_000_000_007
KEY = str(REF)
EFFECTS = ("open", "os.", "subprocess.", "ctypes.call", "fcntl.")
NEVER_MORE_THAN = 400
DRIVES = SmallDrives()  # templates of images, made once for all lives: a child forks with them


def killed_at(n: int, work: Callable[[], object]) -> bool:
    """Run the work in a child that dies before its n-th effect; false if it got to its end."""
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def hook(event: str, _arguments: object) -> None:
            if event.startswith(EFFECTS) and next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


class Worker:
    """The store's mechanisms as one worker has them; a new one for each life."""

    def __init__(self, world: StoreHost) -> None:
        data, state = str(world.data), str(world.state)
        base = str(world.jails)
        self.world = world
        self.shared = SharedFiles(data)
        self.artifacts = Artifacts(data=data, state=state)
        self.disks = DataDisks(data=data, jail_base=base)
        self.jails = Jails(data=data, state=state, jail_base=base)
        self.jails._drives = DRIVES
        self.snapshots = Snapshots(
            data=data, state=state, jail_base=base, cpu_model="test", kernel_release="test"
        )

    @property
    def disk(self) -> Path:
        return self.world.instance / "volumes" / "data.ext4"

    def make_disk(self) -> None:
        self.disks._ensure(DataDiskSpec(REF, 4, None))

    def jail(self, launch: int) -> str:
        jail_id = naming.jail_id(REF, launch)
        files = (JailFile("data.ext4", str(self.disk), identity_of(self.disk.stat())),)
        self.jails._ensure(JailSpec(REF, jail_id, UID, files, config=b"{}", secrets=b"{}"))
        return jail_id

    def vmm_writes(self, launch: int) -> None:
        root = self.world.jails / "firecracker" / naming.jail_id(REF, launch) / "root"
        (root / "snap").mkdir(exist_ok=True)
        for name, data in (("state", b"state"), ("mem", b"\1" * (1 << 20))):
            (root / "snap" / name).write_bytes(data)
            os.chown(root / "snap" / name, UID, UID)

    def seal(self) -> None:
        facts = SnapshotFacts(
            ref=REF,
            number=1,
            launch=1,
            revision=REVISION,
            vcpus=1,
            mem_mib=1,
            vmm_version="1.12.1",
            disk=None,
            data_disk_path=str(self.disk),
            keep_drives=True,
        )
        self.snapshots._sealer.seal(naming.jail_id(REF, 1), facts)

    async def sleep(self) -> None:
        self.vmm_writes(1)
        self.seal()
        await self.snapshots.publish(REF, 1)
        self.jails._remove(naming.jail_id(REF, 1))

    async def remove_all(self) -> None:
        """After this no trace of the instance may be left but its disk, which is root's."""
        for jail_id in await self.jails.list_ids():
            await self.jails.remove(jail_id)
        assert str(self.world.jails) not in Path("/proc/mounts").read_text()
        assert self.disk.stat().st_nlink == 1
        assert self.disk.stat().st_uid == 0


@pytest.fixture
def worlds(tmp_path: Path) -> Callable[[int], Worker]:
    for drive in (CONFIG, SECRETS):
        with tempfile.TemporaryFile() as file:
            DRIVES.write(file.fileno(), drive, b"{}")
    return lambda n: Worker(make_world(tmp_path / str(n)))


async def test_an_import(worlds: Callable[[int], Worker]) -> None:
    spec = ArtifactSpec("acme", "web", REVISION)
    n = 0
    for n in range(NEVER_MORE_THAN):
        first = worlds(n)
        killed = killed_at(n, partial(first.artifacts._ensure, spec, CancelToken()))

        second = Worker(first.world)
        found = await second.artifacts.ensure(spec)

        original = (first.world.revision / "rootfs.ext4").read_bytes()
        assert Path(found.rootfs).read_bytes() == original
        assert await second.artifacts.exists(spec.key)
        assert os.listdir(first.world.state / "artifacts" / "acme" / "web") == [REVISION]
        if not killed:
            break
    assert n > 10


async def test_a_disk_being_made(worlds: Callable[[int], Worker]) -> None:
    n = 0
    for n in range(NEVER_MORE_THAN):
        first = worlds(n)
        killed = killed_at(n, first.make_disk)

        second = Worker(first.world)
        disk = await second.disks.ensure(DataDiskSpec(REF, 4, None))

        subprocess.run(["e2fsck", "-fn", disk.path], check=True, capture_output=True)
        assert os.listdir(second.disk.parent) == ["data.ext4"]
        await second.disks.remove(KEY)
        assert os.listdir(second.disk.parent) == []
        if not killed:
            break
    assert n > 5


async def test_a_wipe_and_the_removal_of_the_disk(worlds: Callable[[int], Worker]) -> None:
    n = 0
    for n in range(NEVER_MORE_THAN):
        first = worlds(n)
        first.make_disk()
        recorded = identity_of(first.disk.stat())

        def wipe(worker: Worker, recorded: DiskIdentity = recorded) -> None:
            journal = worker.world.top / "wiped"
            known = None if journal.exists() else recorded
            worker.disks._wipe(REF, known, CancelToken())
            journal.touch()  # as Destroy does, before the name goes
            worker.disks._remove(REF)

        killed = killed_at(n, partial(wipe, first))

        wipe(Worker(first.world))

        assert not first.disk.exists()
        if not killed:
            break
    assert n > 2


@pytest.mark.parametrize("then", ["remove", "ensure"])
async def test_a_jail_being_made(worlds: Callable[[int], Worker], then: str) -> None:
    n = 0
    for n in range(NEVER_MORE_THAN):
        first = worlds(n)
        first.make_disk()
        killed = killed_at(n, partial(first.jail, 1))

        second = Worker(first.world)
        if then == "ensure":
            second.jail(1)
            assert second.disk.stat().st_nlink == 2
            assert second.disk.stat().st_uid == UID
        await second.remove_all()
        if not killed:
            break
    assert n > 20


async def test_a_jail_being_removed(worlds: Callable[[int], Worker]) -> None:
    n = 0
    for n in range(NEVER_MORE_THAN):
        first = worlds(n)
        first.make_disk()
        jail_id = first.jail(1)
        killed = killed_at(n, partial(first.jails._remove, jail_id))

        await Worker(first.world).remove_all()
        if not killed:
            break
    assert n > 10


async def test_a_snapshot_being_sealed(worlds: Callable[[int], Worker]) -> None:
    n = 0
    for n in range(NEVER_MORE_THAN):
        first = worlds(n)
        first.make_disk()
        first.jail(1)
        first.vmm_writes(1)
        killed = killed_at(n, first.seal)

        second = Worker(first.world)
        assert await second.snapshots.read(REF) is None
        await second.sleep()

        assert (await second.snapshots.verify(REF, 1)).kept_secrets is not None
        await second.remove_all()
        if not killed:
            break
    assert n > 30


@pytest.mark.parametrize("hashed", [False, True])
async def test_a_snapshot_being_linked(worlds: Callable[[int], Worker], hashed: bool) -> None:
    n = 0
    for n in range(NEVER_MORE_THAN):
        first = worlds(n)
        first.make_disk()
        first.jail(1)
        await first.sleep()
        if hashed:
            await first.snapshots.hash_memory(REF, 1)
            first.snapshots.close()
        info = await first.snapshots.verify(REF, 1)
        jail_id = first.jail(2)
        killed = killed_at(n, partial(first.snapshots._link, jail_id, UID, info))

        second = Worker(first.world)
        await second.remove_all()
        await second.snapshots.restore_ownership(REF, 1)

        assert await second.snapshots.verify(REF, 1) == info
        if not killed:
            break
    assert n > 10


@pytest.mark.parametrize("waits", [True, False], ids=["blocks too", "names alone"])
async def test_a_snapshot_being_discarded(worlds: Callable[[int], Worker], *, waits: bool) -> None:
    n = 0
    for n in range(NEVER_MORE_THAN):
        first = worlds(n)
        first.make_disk()
        first.jail(1)
        await first.sleep()
        snapshots = first.snapshots
        discard = partial(snapshots._delete, REF, None, discard_dir if waits else unname_dir)
        killed = killed_at(n, discard)

        second = Worker(first.world)
        if await second.snapshots.read(REF) is not None:
            await second.snapshots.verify(REF, 1)
        else:
            with pytest.raises(HostFault):
                await second.snapshots.verify(REF, 1)
        await second.snapshots.delete_all(REF)

        assert os.listdir(first.world.state / "snapshots") == []
        if not killed:
            break
    assert n > 10


async def test_an_instance_file_being_written(worlds: Callable[[int], Worker]) -> None:
    changes = {"firecracker_pid": 4711}
    n = 0
    for n in range(NEVER_MORE_THAN):
        first = worlds(n)
        path = first.world.instance / "instance.json"
        killed = killed_at(n, partial(first.shared._update, REF, changes))

        assert json.loads(path.read_text()).get("firecracker_pid") in {None, 4711}
        await Worker(first.world).shared.update_instance(REF, changes | {"status": "running"})

        assert json.loads(path.read_text())["firecracker_pid"] == 4711
        assert os.listdir(path.parent) == ["instance.json"]
        if not killed:
            break
    assert n > 5
