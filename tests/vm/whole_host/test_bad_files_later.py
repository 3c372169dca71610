"""agentd's files taken away or spoilt under a running instance: it can be put to rest all the same.

Truth is the journal and the kernel: what cannot be written into `instance.json` is told.
"""

import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from schemas.requests import (
    DestroyInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from tests.live_host import LiveHost
from tests.vm.whole_host.shared_host import ref_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

REF = ref_of("later")
NAMES = (REF.tenant_id, REF.pool_id, REF.instance_id)
START, STOP, WAKE = StartInstance(*NAMES), StopInstance(*NAMES), WakeInstance(*NAMES)
SLEEP = SleepInstance(*NAMES, force=False)
DESTROY = DestroyInstance(*NAMES, wipe_volumes=True)


@dataclass(frozen=True)
class Files:
    host: LiveHost
    tenant: Path

    @property
    def pool(self) -> Path:
        return self.tenant / "pools" / REF.pool_id

    @property
    def directory(self) -> Path:
        return self.pool / "instances" / REF.instance_id

    @property
    def file(self) -> Path:
        return self.directory / "instance.json"


def link_to(path: Path, target: str) -> None:
    if path.is_dir():
        path.rename(path.with_name(f"{path.name}.real"))
    else:
        path.unlink()
    path.symlink_to(target)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOIL: dict[str, Callable[[Files], object]] = {
    "cut off": lambda f: f.file.write_bytes(f.file.read_bytes()[:-30]),
    "a link": lambda f: link_to(f.file, "/etc/hostname"),
    "a directory": lambda f: replace_by_directory(f.file),
    "gone": lambda f: f.file.unlink(),
    "another's": lambda f: f.file.write_text('{"tenant_id": "umbra"}'),
    "its directory a link": lambda f: link_to(f.directory, "/etc"),
    "its pool a link": lambda f: link_to(f.pool, "/etc"),
    "its tenant a link": lambda f: link_to(f.tenant, "/etc"),
    "its tenant gone": lambda f: shutil.move(f.tenant, f"{f.tenant}.real"),
}
LOST = ["its directory a link", "its pool a link", "its tenant a link", "its tenant gone"]
UNTOLD = {"gone", "its tenant gone", "another's"}
"""There is no file to write into, or one that can be: hostd keeps all of it but its own fields."""


@pytest_asyncio.fixture(loop_scope="module")
async def files(host: LiveHost) -> AsyncIterator[Files]:
    seeded = host.seed(REF, offset=5, mem_mib=32, secrets=b"{}")
    assert (await host.net_up(seeded))["code"] == "ok"
    assert (await host.run(START))["code"] == "ok"
    tenant = Path(host.settings.paths.data, "tenants", REF.tenant_id)
    files = Files(host, tenant)
    sound = files.file.read_bytes()
    yield files
    for path in (tenant, files.pool, files.directory, files.file):
        if path.is_symlink():
            path.unlink()
        if (real := path.with_name(f"{path.name}.real")).exists():
            real.rename(path)
    if files.file.is_dir():
        files.file.rmdir()
    if files.directory.exists():
        files.file.write_bytes(sound)
    assert (await host.run(DESTROY))["code"] == "ok"


@pytest.mark.parametrize("how", SPOIL)
async def test_a_stop_needs_no_file(files: Files, how: str) -> None:
    host = files.host
    SPOIL[how](files)
    etc = Path("/etc/hostname").read_bytes()

    stopped = await host.run(STOP)

    assert (stopped["code"], stopped["status"]) == ("ok", "stopped"), stopped
    told = [line for line in stopped.get("left_behind", []) if line.startswith("instance.json")]
    assert bool(told) == (how not in UNTOLD), stopped
    now = await host.inventory()
    assert not any(now[kind] for kind in ("processes", "taps", "cgroups", "jails", "sockets"))
    assert Path("/etc/hostname").read_bytes() == etc


@pytest.mark.parametrize("how", ["cut off", "a link", "a directory", "gone", "another's"])
async def test_a_sleep_needs_no_file_and_a_wake_says_what_is_wrong_with_it(
    files: Files, how: str
) -> None:
    host = files.host
    sound = files.file.read_bytes()
    SPOIL[how](files)

    slept = await host.run(SLEEP)
    refused = await host.run(WAKE)

    assert (slept["code"], slept["status"]) == ("ok", "sleeping"), slept
    assert bool(slept.get("left_behind")) == (how not in UNTOLD)
    assert refused["code"] == ("not_found" if how == "gone" else "invalid"), refused
    assert "instance.json" in refused["detail"]["path"]
    assert refused["status"] == "sleeping"
    if files.file.is_dir():
        files.file.rmdir()
    files.file.unlink(missing_ok=True)
    files.file.write_bytes(sound)
    assert (await host.run(WAKE))["code"] == "ok"
    assert (await host.stat(REF))["boots"] == 1


@pytest.mark.parametrize("how", [how for how in SPOIL if how not in LOST])
async def test_a_destroy_needs_no_file(files: Files, how: str) -> None:
    host = files.host
    SPOIL[how](files)

    destroyed = await host.run(DESTROY)

    assert (destroyed["code"], destroyed["status"]) == ("ok", "destroyed"), destroyed
    assert not files.directory.exists()
    now = await host.inventory()
    assert not any(now[kind] for kind in ("processes", "taps", "cgroups", "jails", "sockets"))
    assert Path("/etc/hostname").exists()


@pytest.mark.parametrize("how", LOST)
async def test_volumes_that_cannot_be_reached_are_not_taken_for_wiped(
    files: Files, how: str
) -> None:
    host = files.host
    before = await host.inventory()
    SPOIL[how](files)

    refused = await host.run(DESTROY)

    assert (refused["code"], refused["status"]) == ("invalid", "running"), refused
    assert await host.inventory() == before
    assert (await host.stat(REF))["boots"] == 1
