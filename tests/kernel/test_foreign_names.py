"""What somebody else puts into hostd's directories is seen or left out, and is fatal to nothing."""

import asyncio
import contextlib
import os
import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from handlers.host.inventory import AGENTD_FILES_MAX, Inventory, collect
from handlers.host.jail.layout import JailLayout
from handlers.host.jail.logs import JailLogs
from handlers.host.jail.warm_jails import WarmLayout
from handlers.host.snapshot.manifest import numbers_of
from handlers.host.storage.disk_space import DiskSpace
from handlers.host.vmm.cgroups import CgroupTree, find_mount
from schemas.requests import InstanceRef
from schemas.settings import LimitSettings, PathSettings, Settings
from tests.kernel.net.netns import Namespace

ROOT = Path(__file__).parents[2]
LISTING = re.compile(r"\b(os\.listdir|os\.scandir|os\.walk|\.iterdir|\.glob|\.rglob)\(")
NAMES = [b"lost+found", b"VM1", b"test_vm", b"\xff\xfe", b"with space", b"line\nbreak", b"..."]
REF = InstanceRef("acme", "web", "i-1")
DIRECTORIES = [
    "state", "state/jails", "state/jails/firecracker", "state/artifacts", "state/artifacts/acme",
    "state/artifacts/acme/web", "state/snapshots", "state/snapshots/acme",
    "state/snapshots/acme/web", "state/snapshots/acme/web/i-1", "state/logs", "state/logs/acme",
    "state/logs/acme/web", "state/logs/acme/web/i-1", "data/tenants", "data/tenants/acme",
]  # fmt: skip
# Modules that list a directory, and whose names they take.
LISTERS = {
    "handlers/host/facts.py": "interfaces of the kernel",
    "handlers/host/inventory.py": "all directories: below",
    "handlers/host/jail/layout.py": "jails: below",
    "handlers/host/jail/logs.py": "logs: below",
    "handlers/host/jail/warm_jails.py": "jails: below",
    "handlers/host/linux/openat2.py": "a directory that is removed as a whole",
    "handlers/host/linux/procfs.py": "processes of the kernel",
    "handlers/host/linux/rmtree.py": "a directory that is removed as a whole",
    "handlers/host/net/nft/libnftables.py": "descriptors of this process",
    "handlers/host/orphans.py": "an orphan that is removed as a whole",
    "handlers/host/snapshot/discards.py": "a snapshot that is removed as a whole",
    "handlers/host/snapshot/manifest.py": "snapshots: below",
    "handlers/host/storage/data_disks.py": "jails that begin with an instance's ID",
    "handlers/host/storage/disk_space.py": "all directories: below",
    "handlers/host/storage/disk_proof.py": "processes of the kernel",
    "handlers/host/vmm/binaries.py": "copies of Firecracker: names of a pattern only",
    "handlers/host/vmm/binary_files.py": "`[vmm] versions_dir`: names of a pattern only",
    "handlers/host/vmm/cgroups.py": "cgroups: below",
    "handlers/host/vmm/confinement.py": "threads of a process",
    "handlers/host/vmm/warm_vmms.py": "cgroups of warm VMMs: names of a pattern only",
    "worker/control/dump.py": "descriptors of this process",
    "worker/demo/cleanup.py": "the demo's own directory",
    "worker/descriptors.py": "descriptors of this process",
    "worker/journal/migration/backup.py": "backups of the journal: names of a pattern only",
}


def test_every_module_that_lists_a_directory_is_known_here() -> None:
    found = {
        str(path.relative_to(ROOT))
        for top in ("handlers", "worker")
        for path in (ROOT / top).rglob("*.py")
        if LISTING.search(path.read_text(encoding="utf-8"))
    }

    assert found == LISTERS.keys()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        paths=PathSettings(data=f"{tmp_path}/data", state=f"{tmp_path}/state"),
        limits=LimitSettings(cgroup=f"hostd-test-{os.getpid()}-names", enforce=False),
    )


def put(directory: Path, kind: str) -> None:
    """Something of each name, of this kind, into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        path = os.path.join(os.fsencode(directory), name)
        if kind == "directory":
            os.makedirs(path + b"/inside", exist_ok=True)
        elif kind == "link":
            os.symlink(b"/nonexistent", path)
        elif kind == "socket":
            os.mknod(path, 0o140600)
        else:
            Path(os.fsdecode(path)).write_bytes(b"x")


@pytest.mark.parametrize("kind", ["directory", "file", "link", "socket"])
async def test_foreign_names_are_fatal_to_no_listing(
    settings: Settings, tmp_path: Path, kind: str
) -> None:
    for directory in DIRECTORIES:
        put(tmp_path / directory, kind)
    state = settings.paths.state
    namespace = Namespace()
    try:
        found = await asyncio.to_thread(collect, settings, enter=namespace.enter)
    finally:
        namespace.close()

    assert msgspec.json.decode(msgspec.json.encode(found), type=Inventory) == found
    assert (found.jails, found.warm, found.cgroups) == ((), (), ())
    assert JailLayout(settings.jail_base).list_ids() == []
    assert JailLayout(settings.jail_base).ids_of(REF) == []
    assert WarmLayout(settings.jail_base).list_ids() == []
    assert numbers_of(f"{state}/snapshots", REF) == []
    logs = JailLogs(JailLayout(settings.jail_base), state=state, limit_bytes=1 << 20)
    assert logs.launches(REF) == []
    assert logs.bound() == 0
    disk = DiskSpace(state=state, reserve_mib=1)
    assert (await disk.usage("acme")).total_bytes >= 0


def collected(settings: Settings) -> Inventory:
    namespace = Namespace()
    try:
        return collect(settings, enter=namespace.enter)
    finally:
        namespace.close()


def test_nothing_below_agentds_directories_makes_the_inventory_fail(
    settings: Settings, tmp_path: Path
) -> None:
    """1,200 directories in each other: deeper than Python recurses, longer than a path may be."""
    for place in ("tenants/acme", "tenants/acme/pools/web/instances/i-1"):
        (tmp_path / "data" / place).mkdir(parents=True, exist_ok=True)
        at = os.open(tmp_path / "data" / place, os.O_RDONLY)
        for _ in range(1200):
            with contextlib.suppress(FileExistsError):
                os.mkdir("pools", dir_fd=at)
            inner = os.open("pools", os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = inner
        os.close(at)
    left = tmp_path / "data/tenants/acme/pools/web/instances/i-1/.instance.json.hostd"
    left.touch()
    try:
        assert collected(settings).temp == (str(left),)
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "data"], check=True)


def test_names_below_agentds_directories_that_hostd_cannot_have_made_are_left_out(
    settings: Settings, tmp_path: Path
) -> None:
    instance = tmp_path / "data/tenants/acme/pools/web/instances/i-1"
    for directory in (
        instance / ".directory.hostd",
        instance / "volumes",
        tmp_path / "data/tenants/Acme",
        tmp_path / "data/tenants/acme/pools/we\nb",
        tmp_path / "data/tenants/acme/other",
    ):
        directory.mkdir(parents=True)
        (directory / ".x.hostd").touch()
    for name in (b".\xff.hostd", b".\x1b[2J.hostd", b".a\nb.hostd"):
        Path(os.fsdecode(os.fsencode(instance) + b"/" + name)).touch()
    left = instance / ".instance.json.hostd"
    left.touch()

    assert collected(settings).temp == (str(left),)


def test_of_agentds_files_no_more_than_a_thousand_are_listed(
    settings: Settings, tmp_path: Path
) -> None:
    instance = tmp_path / "data/tenants/acme/pools/web/instances/i-1"
    instance.mkdir(parents=True)
    for n in range(AGENTD_FILES_MAX + 1):
        (instance / f".{n}.hostd").touch()

    assert len(collected(settings).temp) == AGENTD_FILES_MAX


def test_foreign_cgroups_are_no_instances(settings: Settings) -> None:
    tree = CgroupTree.of(settings)
    base = Path(find_mount(), settings.limits.cgroup)
    names = [os.fsdecode(name) for name in NAMES if b"\n" not in name]
    try:
        base.mkdir()
        for name in names:
            (base / name).mkdir()
        (base / "acme").mkdir()
        for name in names:
            (base / "acme" / name).mkdir()

        assert list(tree.leaves("0123456789ab-1")) == []
        assert tree.launches(REF) == []
    finally:
        for path in sorted(base.rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
        base.rmdir()
