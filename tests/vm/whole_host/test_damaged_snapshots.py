"""A snapshot that is not what was saved is refused; its instance sleeps on, and wakes put right."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    SleepInstance,
    StartInstance,
    WakeInstance,
)
from tests.live_host import LiveHost
from tests.vm.whole_host.shared_host import events, ref_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Sleeper:
    """A sleeping instance, its memory hashed. `awake` is what its guest said before."""

    host: LiveHost
    ref: InstanceRef
    snapshot: Path
    disk: Path
    awake: dict[str, Any]


@pytest_asyncio.fixture(loop_scope="module")
async def sleeper(host: LiveHost) -> AsyncIterator[Sleeper]:
    ref = ref_of("sleeper")
    names = (ref.tenant_id, ref.pool_id, ref.instance_id)
    seeded = host.seed(ref, offset=5, mem_mib=32)
    assert (await host.net_up(seeded))["code"] == "ok"
    assert (await host.run(StartInstance(*names)))["code"] == "ok"
    awake = await host.stat(ref)
    slept = await host.run(SleepInstance(*names, force=False))
    assert slept["code"] == "ok", slept
    number = slept["detail"]["snapshot"]
    await hashed(host, ref)
    directory = Path(host.settings.paths.state, "snapshots", str(ref), str(number))
    tenant = Path(host.settings.paths.data, "tenants", ref.tenant_id)
    disk = tenant / "pools" / ref.pool_id / "instances" / ref.instance_id / "volumes" / "data.ext4"
    yield Sleeper(host, ref, directory, disk, awake)
    assert (await host.run(DestroyInstance(*names, wipe_volumes=True)))["code"] == "ok"


async def hashed(host: LiveHost, ref: InstanceRef) -> None:
    """Wait for the event that says that the memory's hash was taken, of the last sleep."""
    async with asyncio.timeout(30):
        while True:
            mine = [e for e in await events(host) if e.get("instance_id") == ref.instance_id]
            if mine and "mem_sha256" in mine[-1].get("detail", {}):
                return
            await asyncio.sleep(0.05)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def exchange(path: Path) -> None:
    """Another file of the same size."""
    size_bytes = path.stat().st_size
    path.unlink()
    with path.open("wb") as file:
        file.truncate(size_bytes)


def unlink_all(directory: Path) -> None:
    for name in os.listdir(directory):
        (directory / name).unlink()


SPOIL: dict[str, Callable[[Sleeper], object]] = {
    "half a memory file": lambda s: halve(s.snapshot / "mem"),
    "a flipped bit of memory": lambda s: flip(s.snapshot / "mem", 1 << 20),
    "another memory file": lambda s: exchange(s.snapshot / "mem"),
    "no memory file": lambda s: (s.snapshot / "mem").unlink(),
    "a flipped bit of the state": lambda s: flip(s.snapshot / "state", 100),
    "half a state file": lambda s: halve(s.snapshot / "state"),
    "no state file": lambda s: (s.snapshot / "state").unlink(),
    "a flipped bit of the manifest": lambda s: flip(s.snapshot / "manifest.json", 30),
    "no manifest": lambda s: (s.snapshot / "manifest.json").unlink(),
    "half a manifest": lambda s: halve(s.snapshot / "manifest.json"),
    "nothing in the directory": lambda s: unlink_all(s.snapshot),
    "no directory": lambda s: shutil.rmtree(s.snapshot),
    "a disk written to since": lambda s: flip(s.disk, 8 << 20),
}


@pytest.mark.parametrize("case", SPOIL)
async def test_a_spoilt_snapshot_is_refused_and_wakes_once_it_is_put_right(
    sleeper: Sleeper, case: str, tmp_path: Path
) -> None:
    host, ref = sleeper.host, sleeper.ref
    wake = WakeInstance(ref.tenant_id, ref.pool_id, ref.instance_id)
    saved = tmp_path / "saved"
    shutil.copytree(sleeper.snapshot, saved)
    times = sleeper.disk.stat()
    before = await host.inventory()
    file = instance_json(sleeper)
    SPOIL[case](sleeper)

    refused = await host.run(wake)

    assert refused["code"] == "host_fault", refused
    assert refused["status"] == "sleeping"
    assert refused["detail"]["act"] == "operator"
    assert not refused["retryable"]
    assert not refused.get("left_behind")
    assert (await host.describe(ref))["status"] == "sleeping"
    assert instance_json(sleeper) == file

    # In place, as an operator would from a backup.
    if case == "a disk written to since":
        flip(sleeper.disk, 8 << 20)
        os.utime(sleeper.disk, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        shutil.copytree(saved, sleeper.snapshot, dirs_exist_ok=True)
    assert await host.inventory() == before
    woken_reply = await host.run(wake)
    assert woken_reply["code"] == "ok", woken_reply
    woken = await host.stat(ref)
    assert woken["boot_id"] == sleeper.awake["boot_id"]
    assert woken["counter"] > sleeper.awake["counter"]
    assert woken["boots"] == 1


def instance_json(sleeper: Sleeper) -> bytes:
    return (sleeper.disk.parents[1] / "instance.json").read_bytes()
