"""Disk space is admitted before anything is made: the tenant's quota, the host's reserve."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from handlers.specs import DiskUsage
from schemas.codes import Code
from schemas.files import InstanceResources, PoolSpec
from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    Request,
    SetupNetwork,
    StartInstance,
    TeardownNetwork,
)
from tests.constants import DESTROY, NET, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, instance_file, seeded
from tests.fakes.memory_worker import memory_worker

KEEP = DestroyInstance("acme", "web", "i-1", wipe_volumes=False)
UP = SetupNetwork("acme", NET)
DOWN = TeardownNetwork("acme", NET)
GIB = 1 << 30


def with_quota(machine: FakeHost, max_disk_gib: int) -> None:
    tenant = machine.tenants["acme"]
    quotas = msgspec.structs.replace(tenant.quotas, max_disk_gib=max_disk_gib)
    machine.tenants["acme"] = msgspec.structs.replace(tenant, quotas=quotas)


def big_disk(machine: FakeHost) -> None:
    machine.pools["acme", "web"] = PoolSpec("web", "acme", InstanceResources(1, 128, 2048))


def big_import(machine: FakeHost) -> None:
    machine.import_bytes = 2 * GIB


def used(**more: int) -> Callable[[FakeHost], None]:
    def use(machine: FakeHost) -> None:
        machine.usage = replace(
            DiskUsage(artifacts_bytes=0, snapshots_bytes=0, logs_bytes=0), **more
        )

    return use


QUOTA_EXCEEDED: dict[str, tuple[Callable[[FakeHost], None], str]] = {
    "data disk": (big_disk, "with its data disk needs"),
    "artifact": (big_import, "artifact acme/web/r1 needs"),
    "artifacts in use": (used(artifacts_bytes=GIB), "artifacts 1024"),
    "snapshots in use": (used(snapshots_bytes=GIB), "snapshots 1024"),
    "logs in use": (used(logs_bytes=GIB), "logs 1024"),
}


@pytest.mark.parametrize("what", QUOTA_EXCEEDED)
async def test_a_start_beyond_the_disk_quota_makes_nothing(what: str, tmp_path: Path) -> None:
    machine = seeded()
    with_quota(machine, 1)
    arrange, named = QUOTA_EXCEEDED[what]
    arrange(machine)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        before = dict(machine.resources)

        reply = await worker.run(START)

        assert reply.code is Code.EXHAUSTED, reply
        assert named in str(reply.response)
        assert reply.detail["path"] == "tenant.json: $.quotas.max_disk_gib"
        assert machine.resources == before
        assert not worker.host.disk_claims


@pytest.mark.parametrize("arrange", [big_disk, big_import], ids=["data disk", "artifact"])
async def test_a_start_beyond_the_hosts_reserve_makes_nothing(
    arrange: Callable[[FakeHost], None], tmp_path: Path
) -> None:
    machine = seeded()
    arrange(machine)
    machine.disk_free_bytes = 2 * GIB  # of which 1 GiB is the reserve
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        before = dict(machine.resources)

        reply = await worker.run(START)

        assert reply.code is Code.EXHAUSTED, reply
        assert "disk_reserve_mib" in str(reply.response)
        assert machine.resources == before


async def test_a_sleep_without_space_leaves_the_guest_undrained(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        await worker.run(START)
        machine.seen.clear()
        machine.disk_free_bytes = GIB + (100 << 20)

        reply = await worker.run(SLEEP)

        assert (reply.code, reply.status) == (Code.EXHAUSTED, "running"), reply
        assert "a snapshot of acme/web/i-1 needs" in str(reply.response)
        assert machine.seen == []


async def test_a_sleep_needs_no_tenant_json(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        await worker.run(START)
        del machine.tenants["acme"]

        assert (await worker.run(SLEEP)).code is Code.OK


@pytest.mark.parametrize("host_bound", [False, True], ids=["quota", "reserve"])
async def test_starts_at_once_do_not_share_the_same_space(
    tmp_path: Path, *, host_bound: bool
) -> None:
    machine = seeded()
    machine.pools["acme", "web"] = PoolSpec("web", "acme", InstanceResources(1, 128, 1000))
    if host_bound:
        machine.disk_free_bytes = 4 * GIB  # three beside the reserve
    else:
        with_quota(machine, 3)
    refs = [InstanceRef("acme", "web", f"n-{n}") for n in range(6)]
    for n, ref in enumerate(refs):
        machine.files[ref] = instance_file(ref, 10 + n)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        machine.stuck_imports.add("acme")  # all are admitted or refused before a disk is made
        ids = [await worker.send(StartInstance("acme", "web", r.instance_id)) for r in refs]
        async with asyncio.timeout(10):
            while True:
                results = [await worker.journal.commands.result(each) for each in ids]
                refused = [each for each in results if each is not None and each.reply is not None]
                if len(refused) == 3:
                    break
                await asyncio.sleep(0)

        assert sum(claim.size_bytes for claim in worker.host.disk_claims) <= 3 * GIB
        assert len([claim for claim in worker.host.disk_claims if claim.size_bytes]) == 3


async def test_discarded_memory_counts_until_its_blocks_are_free(tmp_path: Path) -> None:
    machine = seeded()
    with_quota(machine, 1)
    machine.slow_frees = GIB - (200 << 20)
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START, SLEEP, STOP, START, SLEEP, STOP, START):
            assert (await worker.run(request)).code is Code.OK

        refused = await worker.run(SLEEP)

        assert refused.code is Code.EXHAUSTED
        assert len(machine.freeing) == 2
        for freed in machine.freeing:
            freed.set_result(None)
        assert (await worker.run(SLEEP)).code is Code.OK
        assert not worker.host.disk_claims


async def test_kept_volumes_count_until_they_are_wiped(tmp_path: Path) -> None:
    machine = seeded()
    machine.pools["acme", "web"] = PoolSpec("web", "acme", InstanceResources(1, 128, 900))
    with_quota(machine, 1)
    second = InstanceRef("acme", "web", "i-2")
    machine.files[second] = instance_file(second, 6)
    start = StartInstance("acme", "web", "i-2")
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        assert (await worker.run(START)).code is Code.OK
        assert (await worker.run(KEEP)).code is Code.OK
        assert (await worker.run(start)).code is Code.EXHAUSTED

        assert (await worker.run(DESTROY)).code is Code.OK

        assert (await worker.run(start)).code is Code.OK


async def test_a_stopped_instance_starts_again_within_a_quota_that_its_disk_fills(
    tmp_path: Path,
) -> None:
    machine = seeded()
    machine.pools["acme", "web"] = PoolSpec("web", "acme", InstanceResources(1, 128, 1000))
    with_quota(machine, 1)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        for request in (START, STOP, START, STOP):
            assert (await worker.run(request)).code is Code.OK


REFUSED_WHEN_FULL: dict[str, tuple[tuple[Request, ...], Request]] = {
    "start": ((UP,), START),
    "wake": ((UP, START, SLEEP), WAKE),
    "sleep": ((UP, START), SLEEP),
    "setup": ((), UP),
}
DONE_WHEN_FULL: dict[str, tuple[tuple[Request, ...], Request]] = {
    "stop": ((UP, START), STOP),
    "destroy": ((UP, START), DESTROY),
    "destroy and keep": ((UP, START), KEEP),
    "destroy a sleeping one": ((UP, START, SLEEP), DESTROY),
    "teardown": ((UP,), DOWN),
}


@pytest.mark.parametrize("name", [*REFUSED_WHEN_FULL, *DONE_WHEN_FULL])
async def test_on_a_full_disk_only_what_gives_space_back_is_done(name: str, tmp_path: Path) -> None:
    before, request = (REFUSED_WHEN_FULL | DONE_WHEN_FULL)[name]
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for each in before:
            assert (await worker.run(each)).code is Code.OK
        resources = dict(machine.resources)
        machine.disk_low, machine.disk_free_bytes = True, 0

        reply = await worker.run(request)

        if name in DONE_WHEN_FULL:
            assert reply.code is Code.OK, reply
        else:
            assert reply.code is Code.EXHAUSTED, reply
            assert reply.detail["act"] == "scheduler"
            assert machine.resources == resources


def test_each_command_is_in_one_of_the_two_tables() -> None:
    rows = {type(request) for _, request in (REFUSED_WHEN_FULL | DONE_WHEN_FULL).values()}

    assert rows == {type(each) for each in (UP, DOWN, START, STOP, SLEEP, WAKE, DESTROY)}


@pytest.mark.parametrize("before", [(UP, START, STOP), (UP, START, SLEEP)], ids=["start", "wake"])
async def test_a_lowered_quota_keeps_nothing_from_running_again(
    before: tuple[Request, ...], tmp_path: Path
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for each in before:
            assert (await worker.run(each)).code is Code.OK
        with_quota(machine, 0)

        reply = await worker.run(WAKE if SLEEP in before else START)

        assert reply.code is Code.OK, reply


async def test_a_revision_that_is_being_removed_is_admitted_as_an_import(tmp_path: Path) -> None:
    machine = seeded()
    with_quota(machine, 1)
    big_import(machine)
    machine.resources["artifact", "acme/web/r1"] = None
    machine.half_removed.add("acme/web/r1")
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)

        reply = await worker.run(START)

    assert reply.code is Code.EXHAUSTED
    assert "artifact acme/web/r1 needs" in getattr(reply.response, "message", "")
