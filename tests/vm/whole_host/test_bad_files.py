"""agentd's files missing, broken or hostile: a Start says which one, and nothing has happened.

Each case then puts the file right and starts the instance: nothing was lost either.
"""

import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from schemas.requests import DestroyInstance, InstanceRef, StartInstance
from tests.live_host import LiveHost
from tests.vm.whole_host.shared_host import ref_of
from worker.cli.context import CliError
from worker.cli.seed import Seeded

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class InstanceDirs:
    """Where agentd's files of one instance are."""

    host: LiveHost
    ref: InstanceRef
    seeded: Seeded

    @property
    def tenant(self) -> Path:
        return Path(self.host.settings.paths.data, "tenants", self.ref.tenant_id)

    @property
    def pool(self) -> Path:
        return self.tenant / "pools" / self.ref.pool_id

    @property
    def directory(self) -> Path:
        return self.pool / "instances" / self.ref.instance_id

    @property
    def file(self) -> Path:
        return self.directory / "instance.json"

    @property
    def revision(self) -> Path:
        return self.pool / "artifacts" / "revisions" / str(self.seeded.revision)

    def edit(self, change: Callable[[dict[str, Any]], object], file: Path | None = None) -> None:
        file = file or self.file
        content = json.loads(file.read_bytes())
        change(content)
        file.write_text(json.dumps(content))

    def edit_net(self, **values: object) -> None:
        self.edit(lambda content: content["net"].update(values))


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_file(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def replace_by_link(path: Path, target: str) -> None:
    if path.is_dir():
        path.rename(path.with_name(f"{path.name}.real"))
    else:
        path.unlink()
    path.symlink_to(target)


def link_elsewhere(dirs: InstanceDirs) -> None:
    """A sound file, but not where it must be."""
    there = dirs.tenant / "elsewhere.json"
    shutil.copyfile(dirs.file, there)
    replace_by_link(dirs.file, str(there))


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def write_sparse(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)


def plant_disk(dirs: InstanceDirs) -> None:
    (dirs.directory / "volumes" / "data.ext4").write_bytes(bytes(16 << 20))


# What is done to the files, the code of the answer, and the end of the path that it names.
CASES: dict[str, tuple[Callable[[InstanceDirs], object], str, str]] = {
    "no instance.json": (lambda p: p.file.unlink(), "not_found", "instance.json"),
    "no instance": (lambda p: shutil.rmtree(p.directory), "not_found", "instance.json"),
    "instance.json cut off": (
        lambda p: p.file.write_bytes(p.file.read_bytes()[:-20]),
        "invalid",
        "instance.json: $",
    ),
    "instance.json empty": (lambda p: p.file.write_bytes(b""), "invalid", "instance.json: $"),
    "instance.json no object": (
        lambda p: p.file.write_bytes(b"[]"),
        "invalid",
        "instance.json: $",
    ),
    "instance.json huge": (
        lambda p: p.file.write_bytes(b'"' + b"a" * (2 << 20) + b'"'),
        "invalid",
        "instance.json",
    ),
    "instance.json a link": (link_elsewhere, "invalid", "instance.json"),
    "instance.json a link to /etc/shadow": (
        lambda p: replace_by_link(p.file, "/etc/shadow"),
        "invalid",
        "instance.json",
    ),
    "instance.json a pipe": (lambda p: make_fifo(p.file), "invalid", "instance.json"),
    "instance.json a directory": (
        lambda p: replace_by_directory(p.file),
        "invalid",
        "instance.json",
    ),
    "the instance a link": (
        lambda p: replace_by_link(p.directory, f"{p.directory}.real"),
        "invalid",
        "bad",
    ),
    "the pool a link": (
        lambda p: replace_by_link(p.pool, f"{p.pool}.real"),
        "invalid",
        "instances/bad",
    ),
    "the tenant a link": (
        lambda p: replace_by_link(p.tenant, f"{p.tenant}.real"),
        "invalid",
        "acme",
    ),
    "a status that is none": (
        lambda p: p.edit(lambda c: c.update(status="sleepy")),
        "invalid",
        "instance.json: $.status",
    ),
    "another tenant's id": (
        lambda p: p.edit(lambda c: c.update(tenant_id="umbra")),
        "invalid",
        "instance.json: $.tenant_id",
    ),
    "another tenant's TAP": (
        lambda p: p.edit_net(tap_dev="tn9i5"),
        "invalid",
        "instance.json: $.net.tap_dev",
    ),
    "another MAC": (
        lambda p: p.edit_net(mac="02:fc:00:09:00:05"),
        "invalid",
        "instance.json: $.net.mac",
    ),
    "another gateway": (
        lambda p: p.edit_net(gateway_ip="10.240.7.2"),
        "invalid",
        "instance.json: $.net.gateway_ip",
    ),
    "an address of another tenant": (
        lambda p: p.edit_net(guest_ip="10.240.9.5"),
        "invalid",
        "instance.json: $.net.guest_ip",
    ),
    "the gateway's address": (
        lambda p: p.edit_net(guest_ip="10.240.7.1"),
        "invalid",
        "instance.json: $.net.guest_ip",
    ),
    "the broadcast address": (
        lambda p: p.edit_net(guest_ip="10.240.7.255"),
        "invalid",
        "instance.json: $.net.guest_ip",
    ),
    "no tenant.json": (lambda p: (p.tenant / "tenant.json").unlink(), "not_found", "tenant.json"),
    "tenant.json with another net": (
        lambda p: p.edit(
            lambda c: c["net"].update(ipv4_subnet="10.240.8.0/24", gateway_ip="10.240.8.1"),
            p.tenant / "tenant.json",
        ),
        "invalid",
        "instance.json: $.net.guest_ip",
    ),
    "no pool.json": (lambda p: (p.pool / "pool.json").unlink(), "not_found", "pool.json"),
    "a pool of no memory": (
        lambda p: p.edit(lambda c: c["instance_resources"].update(mem_mib=0), p.pool / "pool.json"),
        "invalid",
        "pool.json: $.instance_resources.mem_mib",
    ),
    "no artifacts": (
        lambda p: shutil.rmtree(p.pool / "artifacts"),
        "not_found",
        "artifacts/current",
    ),
    "current to elsewhere": (
        lambda p: replace_by_link(p.pool / "artifacts" / "current", "../../../../umbra"),
        "invalid",
        "artifacts/current",
    ),
    "current a file": (
        lambda p: replace_by_file(p.pool / "artifacts" / "current", "revisions/1"),
        "invalid",
        "artifacts/current",
    ),
    "a revision that is not there": (
        lambda p: replace_by_link(p.pool / "artifacts" / "current", "revisions/0123"),
        "not_found",
        "revisions/0123",
    ),
    "no kernel": (lambda p: (p.revision / "vmlinux").unlink(), "not_found", "vmlinux"),
    "no rootfs": (lambda p: (p.revision / "rootfs.ext4").unlink(), "not_found", "rootfs.ext4"),
    "a kernel that is a link": (
        lambda p: replace_by_link(p.revision / "vmlinux", "/etc/hostname"),
        "invalid",
        "vmlinux",
    ),
    "a kernel that is none": (
        lambda p: (p.revision / "vmlinux").write_bytes(b"no kernel at all" * 64),
        "invalid",
        "vmlinux",
    ),
    "a kernel cut off": (
        lambda p: os.truncate(p.revision / "vmlinux", 4096),
        "invalid",
        "vmlinux",
    ),
    "a memory of 1 MiB": (
        lambda p: p.edit(lambda c: c["instance_resources"].update(mem_mib=1), p.pool / "pool.json"),
        "invalid",
        "vmlinux",
    ),
    "an initrd larger than the memory": (
        lambda p: write_sparse(p.revision / "initrd", 256 << 20),
        "invalid",
        "initrd",
    ),
    "a disk of 20 TB": (
        lambda p: p.edit(
            lambda c: c["instance_resources"].update(data_disk_mib=20_000_000), p.pool / "pool.json"
        ),
        "invalid",
        "pool.json: $.instance_resources.data_disk_mib",
    ),
    "a grace period of ages": (
        lambda p: p.edit(
            lambda c: c.update(runtime_policy={"graceful_shutdown_seconds": 2**64 - 1}),
            p.pool / "pool.json",
        ),
        "invalid",
        "pool.json: $.runtime_policy.graceful_shutdown_seconds",
    ),
    "another user's kernel": (
        lambda p: os.chown(p.revision / "vmlinux", 1234, 1234),
        "invalid",
        "vmlinux",
    ),
    "another user's instance.json": (
        lambda p: os.chown(p.file, 1234, 1234),
        "invalid",
        "instance.json",
    ),
    "an empty kernel": (lambda p: (p.revision / "vmlinux").write_bytes(b""), "invalid", "vmlinux"),
    "an empty rootfs": (
        lambda p: (p.revision / "rootfs.ext4").write_bytes(b""),
        "invalid",
        "rootfs.ext4",
    ),
    "a disk that hostd did not make": (plant_disk, "invalid", "data.ext4"),
    "a disk that is a link": (
        lambda p: (p.directory / "volumes" / "data.ext4").symlink_to("/etc/hostname"),
        "invalid",
        "data.ext4",
    ),
    "volumes a link": (
        lambda p: replace_by_link(p.directory / "volumes", "/tmp"),
        "invalid",
        "volumes",
    ),
}


@pytest_asyncio.fixture(loop_scope="module")
async def dirs(host: LiveHost) -> AsyncIterator[InstanceDirs]:
    """An instance whose files are as they should be, its network up; gone afterwards."""
    ref = ref_of("bad")
    seeded = host.seed(ref, offset=5)
    assert (await host.net_up(seeded))["code"] == "ok"
    dirs = InstanceDirs(host, ref, seeded)
    sound = Path(host.directory, "sound")
    shutil.copytree(dirs.tenant, sound, symlinks=True)
    yield dirs
    destroy = DestroyInstance(ref.tenant_id, ref.pool_id, ref.instance_id, wipe_volumes=True)
    reply = await host.run(destroy)
    if reply["code"] != "ok":  # the test failed with the files spoilt
        put_right(dirs, sound)
        reply = await host.run(destroy)
    assert reply["code"] == "ok", reply
    put_right(dirs, sound)  # the pool's files too, which a Destroy leaves as they are
    shutil.rmtree(dirs.directory)
    shutil.rmtree(sound)


def put_right(dirs: InstanceDirs, sound: Path) -> None:
    for path in (dirs.tenant, Path(f"{dirs.tenant}.real")):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    shutil.copytree(sound, dirs.tenant, symlinks=True)


@pytest.mark.parametrize("case", CASES)
async def test_a_start_says_which_file_is_wrong_and_changes_nothing(
    dirs: InstanceDirs, case: str
) -> None:
    spoil, code, path = CASES[case]
    host, ref = dirs.host, dirs.ref
    start = StartInstance(ref.tenant_id, ref.pool_id, ref.instance_id)
    spoil(dirs)
    before, files = await host.inventory(), listing(dirs.tenant)

    reply = await host.run(start)

    assert reply["code"] == code, reply
    assert reply["detail"].get("path", "").endswith(path), reply
    assert reply["detail"]["act"] == "sender"
    assert not reply["changed"]
    assert not reply["retryable"]
    assert not reply.get("left_behind")
    assert await host.inventory() == before
    assert listing(dirs.tenant) == files
    assert await status_of(host, ref) in (None, "created")
    assert reply.get("status") in (None, "created")

    put_right(dirs, Path(host.directory, "sound"))
    assert (await host.run(start))["code"] == "ok"


async def status_of(host: LiveHost, ref: InstanceRef) -> str | None:
    """None for an instance that the journal does not know."""
    try:
        return str((await host.describe(ref))["status"])
    except CliError:
        return None


def listing(top: Path) -> dict[str, tuple[int, bytes | str]]:
    """Every file below, by path: its mode, and its bytes or where it points to."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for directory, directories, names in os.walk(top.resolve()):
        for name in [*directories, *names]:
            path = Path(directory, name)
            mode = path.lstat().st_mode
            content: bytes | str = ""
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            found[str(path)] = (mode, content)
    return found
