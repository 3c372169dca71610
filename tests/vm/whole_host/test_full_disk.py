"""A full file system: no guest can cause it, and it costs no tenant its Stop or its Destroy."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from schemas import codec
from schemas.requests import DestroyInstance, InstanceRef, StartInstance, StopInstance
from schemas.subjects import Lane
from tests.constants import DESTROY, REF, SLEEP, START, STOP, WAKE
from tests.live_host import LiveHost, live_host
from worker.cli.seed import Seeded

OTHER = InstanceRef("beta", "web", "i-1")
OTHER_NAMES = (OTHER.tenant_id, OTHER.pool_id, OTHER.instance_id)
DISK_MIB = 48


def free_bytes(host: LiveHost) -> int:
    there = os.statvfs(f"{host.directory}/disk")
    return there.f_bavail * there.f_frsize


def fill(host: LiveHost) -> Path:
    """Somebody takes all that is free."""
    filler = Path(host.directory, "disk", "filler")
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    return filler


def fill_to(host: LiveHost, *, percent: int) -> Path:
    """Somebody takes what is missing to this percentage of the file system."""
    there = os.statvfs(f"{host.directory}/disk")
    total, used = there.f_blocks, there.f_blocks - there.f_bfree
    filler = Path(host.directory, "disk", "filler")
    with filler.open("wb") as file:
        size = (total * percent // 100 - used) * there.f_frsize
        os.posix_fallocate(file.fileno(), 0, size)
    return filler


def write_all(host: LiveHost, ref: InstanceRef) -> None:
    """Every block of the instance's data disk is written, as its guest can do."""
    path = Path(host.settings.paths.data, "tenants", ref.tenant_id, "pools", ref.pool_id)
    with (path / "instances" / ref.instance_id / "volumes" / "data.ext4").open("r+b") as file:
        file.seek(1 << 20)
        for _ in range(1, DISK_MIB):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())


async def wait_state(host: LiveHost, wanted: str) -> None:
    async with asyncio.timeout(30):
        while (await host.ping())["detail"]["host_state"] != wanted:
            await asyncio.sleep(0.05)


@asynccontextmanager
async def two_tenants() -> AsyncGenerator[tuple[LiveHost, Seeded]]:
    """Both run a guest with a data disk."""
    async with live_host(disk_mib=256) as host:
        for ref, net_id in ((REF, 7), (OTHER, 8)):
            seeded = host.seed(ref, net_id=net_id, mem_mib=64, data_disk_mib=DISK_MIB)
            assert (await host.net_up(seeded, ref.tenant_id))["code"] == "ok"
            started = await host.run(StartInstance(ref.tenant_id, ref.pool_id, ref.instance_id))
            assert started["code"] == "ok", started
        yield host, host.seed(InstanceRef("gamma", "web", "i-1"), net_id=9)


async def test_guests_that_write_all_their_disks_take_no_space() -> None:
    async with two_tenants() as (host, _):
        before = free_bytes(host)

        for ref in (REF, OTHER):
            write_all(host, ref)

        assert before - free_bytes(host) < 1 << 20
        for command in (STOP, StopInstance(*OTHER_NAMES)):
            assert (await host.run(command))["code"] == "ok"


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
async def test_on_a_full_disk_stop_and_destroy_go_on(*, restarted: bool) -> None:
    async with two_tenants() as (host, gamma):
        filler = fill(host)
        if restarted:
            await host.kill_worker()
            await host.start_worker(ready=False)
        await wait_state(host, "degraded")

        for refused in (await host.net_up(gamma, "gamma"), await host.run(SLEEP)):
            assert refused["code"] == "exhausted", refused
            assert refused["detail"]["act"] == "scheduler"
        for stop in (STOP, StopInstance(*OTHER_NAMES)):
            done = await host.run(stop)
            assert (done["code"], done["status"]) == ("ok", "stopped"), done
        assert (await host.run(START))["code"] == "exhausted"
        before = free_bytes(host)
        done = await host.run(DestroyInstance(*OTHER_NAMES, wipe_volumes=True))
        assert done["code"] == "ok", done
        assert free_bytes(host) - before >= (DISK_MIB - 12) << 20  # less the ballast

        await wait_state(host, "ready")  # what the Destroy gave back is more than the reserve
        filler.unlink()
        for command in (START, SLEEP, WAKE, STOP, DESTROY):
            assert (await host.run(command))["code"] == "ok"
        events = await host.kept(f"HOSTD_EVT_{host.settings.host.cell}")
        subject = host.subjects.event(Lane.host(), "disk")
        assert [name for name, _, _ in events].count(subject) >= 2


async def test_what_does_not_fit_is_refused_before_it_is_made() -> None:
    async with two_tenants() as (host, gamma):
        assert (await host.net_up(gamma, "gamma"))["code"] == "ok"
        big = InstanceRef("gamma", "big", "i-1")
        host.seed(big, net_id=9, mem_mib=64, data_disk_mib=200)
        before = await host.inventory()
        free = free_bytes(host)

        refused = await host.run(StartInstance("gamma", "big", "i-1"))

        assert refused["code"] == "exhausted", refused
        assert "disk_reserve_mib" in str(refused["response"])
        assert await host.inventory() == before
        assert free - free_bytes(host) < 1 << 20


async def test_above_the_watermark_what_can_wait_is_refused_until_the_low_one() -> None:
    async with live_host(disk_mib=640, disk_high_percent=70.0, disk_low_percent=60.0) as host:
        seeded = host.seed(REF, net_id=7, mem_mib=64)
        assert (await host.net_up(seeded, REF.tenant_id))["code"] == "ok"
        for command in (START, SLEEP):
            assert (await host.run(command))["code"] == "ok"
        filler = fill_to(host, percent=75)
        await wait_state(host, "degraded")

        assert (await host.ping())["detail"]["degraded_by"] == ["disk_watermark"]
        other = host.seed(OTHER, net_id=8)
        assert (await host.net_up(other, OTHER.tenant_id))["code"] == "ok"
        refused = await host.run(StartInstance(*OTHER_NAMES))
        assert refused["detail"]["budget"] == "host.disk_watermark", refused
        assert (await host.run(WAKE))["code"] == "ok"
        assert (await host.run(SLEEP))["detail"]["budget"] == "host.disk_watermark"
        assert (await host.run(replace(SLEEP, force=True)))["code"] == "ok"

        assert (await host.run(DESTROY))["code"] == "ok"
        filler.unlink()
        await wait_state(host, "ready")
        assert (await host.run(StartInstance(*OTHER_NAMES)))["code"] == "ok"
        reasons = [
            codec.decode_event(data).reason
            for subject, _, data in await host.kept(f"HOSTD_EVT_{host.settings.host.cell}")
            if subject == host.subjects.event(Lane.host(), "disk")
        ]
        assert reasons == ["the disk is above its high watermark", "the disk has space again"]
