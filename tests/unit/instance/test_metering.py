"""What a launch and a sleep used is one event each, counted once, and unknown is null."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert
from msgspec.structs import asdict, replace

from handlers.errors import HostFault, Unavailable
from handlers.instance import metering
from handlers.specs import CgroupUsage, TapTraffic
from schemas import codec, naming
from schemas.codes import Code
from schemas.envelopes import Event, EventKind
from schemas.records import InstanceRecord, Status
from schemas.requests import Request
from schemas.usage import (
    SPAN_MAX_MS,
    Clock,
    Launched,
    Metering,
    Moment,
    Rest,
    State,
    Totals,
    UsageDetail,
)
from tests.constants import DESTROY, NET, REF, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import FakeExits, recovery, vmm_watch
from tests.unit.instance.pairs import UP
from tests.unit.journal.journals import record as record_of

TAP = naming.tap_name(NET.tenant_net_id, 5)
MIB = 1 << 20
SUMMED = ("cpu_us", "vcpu_ms", "memory_mib_s", *metering.TRAFFIC)


def run_guest(worker: MemoryWorker, cpu_us: int = 1_500_000, *, for_ms: int = 60_000) -> None:
    """What the kernel has counted by then, and so much later."""
    machine = worker.machine
    machine.cgroup_usage[worker.record().cgroup_key] = CgroupUsage(cpu_us, 4096, 8 * MIB)
    machine.tap_traffic[TAP] = TapTraffic(cpu_us // 10, 1, cpu_us // 5, 3)
    machine.boot_ms += for_ms


async def run_all(worker: MemoryWorker, *requests: Request) -> None:
    for request in requests:
        assert (await worker.run(request)).code is Code.OK


async def events(worker: MemoryWorker) -> list[Event]:
    rows = await worker.journal.outbox.pending("event", 1000)
    return [codec.decode_event(row.payload) for row in rows]


async def used(worker: MemoryWorker) -> list[UsageDetail]:
    return [
        convert(event.detail, UsageDetail)
        for event in await events(worker)
        if event.kind is EventKind.USAGE
    ]


def sums(details: list[UsageDetail]) -> dict[str, int]:
    launches = [each.launch for each in details if each.launch is not None]
    found = {name: sum(getattr(each, name) or 0 for each in launches) for name in SUMMED}
    for state in ("running", "sleeping"):
        spans = [each.span for each in details if each.span.state == state]
        found[f"{state}_ms"] = sum(span.duration_ms or 0 for span in spans)
    return {"launches": len(launches), **found}


def part(totals: Totals, like: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in asdict(totals).items() if name in like}


async def test_the_last_counters_of_a_launch_are_one_event_with_its_end(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START)
        run_guest(worker)
        await run_all(worker, STOP)

        (found,) = await used(worker)
        told = await events(worker)

    assert (found.span.state, found.span.duration_ms, found.span.clock) == (
        "running",
        60_000,
        "boot",
    )
    assert found.launch is not None
    assert asdict(found.launch) == {
        "launch": 1,
        "vcpus": 1,
        "mem_mib": 128,
        "vcpu_ms": 60_000,
        "memory_mib_s": 128 * 60,
        "cpu_us": 1_500_000,
        "memory_peak_bytes": 8 * MIB,
        "guest_sent_bytes": 150_000,
        "guest_sent_packets": 1,
        "guest_received_bytes": 300_000,
        "guest_received_packets": 3,
    }
    status, usage, command = told[-3:]
    assert (status.to, usage.kind, command.kind) == ("stopped", "usage", "command")
    assert usage.command_id == command.command_id
    assert (usage.tenant_id, usage.pool_id, usage.instance_id) == ("acme", "web", "i-1")


async def test_totals_are_the_sums_of_the_events_and_go_with_a_destroy(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START)
        run_guest(worker, 100)
        worker.machine.guests[worker.record().jail_id].counter = 64 * MIB
        await run_all(worker, SLEEP)
        worker.machine.boot_ms += 3_600_000
        await run_all(worker, WAKE)
        run_guest(worker, 2000)
        await run_all(worker, STOP)
        worker.machine.boot_ms += 5000
        await run_all(worker, START)
        run_guest(worker, 30_000)
        await run_all(worker, DESTROY)

        found = await used(worker)
        (gone,) = [event for event in await events(worker) if event.to == "destroyed"]
        worker.machine.files[REF] = instance_file(REF, 5)
        await run_all(worker, START)
        anew = worker.record().metering

    totals = convert(gone.detail["totals"], Totals)
    assert [each.span.state for each in found] == ["running", "sleeping", "running", "running"]
    assert found[-1].totals == totals
    assert part(totals, sums(found)) == sums(found)
    assert (totals.launches, totals.cpu_us, totals.stopped_ms) == (3, 32_100, 5000)
    assert (totals.sleeping_ms, totals.snapshot_mib_s) == (3_600_000, 32 * 3600)
    assert (totals.incomplete, totals.by_wall_clock_ms) == (0, 0)
    sleep = found[1].snapshot
    assert sleep is not None
    assert (sleep.size_bytes, sleep.allocated_bytes) == (64 * MIB, 32 * MIB)
    assert anew is not None
    assert anew.totals.launches == anew.totals.stopped_ms == 0


@pytest.mark.parametrize("before", [(), (START, SLEEP)], ids=["start", "wake"])
async def test_a_launch_that_is_undone_is_in_no_sum(
    before: tuple[Request, ...], tmp_path: Path
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, *before)
        known, count = worker.journal.records.instance(REF), len(await used(worker))
        worker.machine.fail["check_confinement"] = HostFault("not confined")
        reply = await worker.run(WAKE if before else START)

        now = worker.journal.records.instance(REF)
        assert reply.code is Code.HOST_FAULT
        assert len(await used(worker)) == count
    before_, after = (each.metering if each is not None else None for each in (known, now))
    assert (after or Metering()).rest == (before_ or Metering()).rest
    assert (after or Metering()).totals == (before_ or Metering()).totals


CUTS = [
    (request, f"{edge}:{step}")
    for request, steps in (
        (STOP, ("remove_vmm", "read_usage", "remove_tap", "remove_jail", "remove_cgroup")),
        (SLEEP, ("remove_vmm", "read_usage", "remove_tap", "remove_jail", "remove_cgroup")),
        (DESTROY, ("remove_vmm", "read_usage", "remove_tap", "remove_cgroup", "remove_files")),
    )
    for step in steps
    for edge in ("before", "after")
] + [(request, "before:outcome") for request in (STOP, SLEEP, DESTROY)]


@pytest.mark.parametrize(("request_", "point"), CUTS)
async def test_a_launch_is_counted_once_wherever_the_worker_is_killed(
    request_: Request, point: str, tmp_path: Path
) -> None:
    machine, reached = seeded(), asyncio.Event()
    armed = False

    async def stop_there(moment: str) -> None:
        if armed and moment == point:
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", machine, failpoint=stop_there) as worker:
        await run_all(worker, UP, START)
        run_guest(worker)
        armed = True
        command_id = await worker.send(request_)
        await asyncio.wait_for(reached.wait(), 10)
        await worker.kill()

    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.reply(command_id)).code is Code.OK
        (found,) = await used(worker)

    assert found.launch is not None
    assert (found.launch.cpu_us, found.launch.guest_sent_bytes) == (1_500_000, 150_000)
    assert (found.totals.launches, found.totals.incomplete) == (1, 0)


async def test_a_launch_that_the_next_worker_completes_began_when_its_vmm_was_journalled(
    tmp_path: Path,
) -> None:
    machine, reached = seeded(), asyncio.Event()

    async def stop_there(moment: str) -> None:
        if moment == "after:start_vm":
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", machine, failpoint=stop_there) as worker:
        await run_all(worker, UP)
        command_id = await worker.send(START)
        await asyncio.wait_for(reached.wait(), 10)
        await worker.kill()
    run_guest(worker)

    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.reply(command_id)).code is Code.OK
        await run_all(worker, STOP)
        (found,) = await used(worker)

    assert (found.span.duration_ms, found.totals.launches) == (60_000, 1)


async def test_the_time_that_an_instance_was_stopped_is_in_the_totals_at_its_end(
    tmp_path: Path,
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START, STOP)
        worker.machine.boot_ms += 5000
        await run_all(worker, DESTROY)
        (gone,) = [event for event in await events(worker) if event.to == "destroyed"]

    assert gone.detail["totals"]["stopped_ms"] == 5000


async def test_a_late_reading_of_an_earlier_launch_changes_no_record(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START)
        earlier = worker.record()
        run_guest(worker)
        await run_all(worker, STOP, START)
        now = worker.record()
        await metering.read_last(earlier, worker.host, seen=True)

        assert worker.record() == now


def test_the_begin_of_an_earlier_launch_is_not_that_of_this_one() -> None:
    first, now = Moment(1, 1, "b1"), Moment(9, 9, "b1")
    record = replace(record_of(), launch=2, metering=Metering(launched=Launched(1, first)))

    assert metering.began(record, now).launched == Launched(2, now)


async def test_an_exit_is_counted_with_its_status(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START)
        watch = vmm_watch(worker, FakeExits(worker.machine))
        watch.sync_all()
        run_guest(worker)
        worker.machine.kill(worker.record().jail_id)
        async with asyncio.timeout(10):
            while worker.record().status is not Status.FAILED:
                await asyncio.sleep(0)

        (found,) = await used(worker)
        told = [event.kind for event in await events(worker)][-2:]

    assert told == [EventKind.STATUS, EventKind.USAGE]
    assert found.launch is not None
    assert (found.span.duration_ms, found.launch.cpu_us) == (60_000, 1_500_000)


async def test_how_long_a_vmm_lived_that_nobody_saw_end_is_unknown(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await run_all(worker, UP, START)
        run_guest(worker)
        machine.kill(worker.record().jail_id)
    machine.boot_ms += 86_400_000

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()
        (found,) = await used(worker)

    assert found.launch is not None
    assert found.launch.cpu_us == 1_500_000
    assert (found.span.duration_ms, found.span.clock) == (None, None)
    assert (found.launch.vcpu_ms, found.launch.memory_mib_s) == (None, None)
    assert (found.totals.launches, found.totals.incomplete, found.totals.running_ms) == (1, 1, 0)


async def test_what_a_reboot_took_is_null_and_not_zero(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await run_all(worker, UP, START)
        run_guest(worker)
    reboot(machine)

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        (found,) = await used(worker)

    assert worker.record().status is Status.STOPPED
    assert found.launch is not None
    known = {name: value for name, value in asdict(found.launch).items() if value is not None}
    assert known == {"launch": 1, "vcpus": 1, "mem_mib": 128}
    assert found.span.duration_ms is None
    assert (found.totals.launches, found.totals.incomplete) == (1, 1)


def reboot(machine: FakeHost) -> None:
    """Nothing volatile is left."""
    for jail_id in tuple(machine.guests):
        machine.kill(jail_id)
    for kind, key in tuple(machine.resources):
        if kind in {"cgroup", "tap", "pin", "bridge", "tenant_rules"}:
            del machine.resources[kind, key]
    machine.boot_id, machine.boot_ms = "00000000-0000-4000-8000-000000000002", 4000


async def test_a_counter_that_the_kernel_does_not_give_fails_no_stop(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START)
        run_guest(worker)

        async def refused(key: str) -> None:
            raise Unavailable(f"the kernel does not answer for {key}")

        worker.host.taps.traffic = refused  # type: ignore[method-assign]
        await run_all(worker, STOP)
        (found,) = await used(worker)

    assert found.launch is not None
    assert found.launch.guest_sent_bytes is None
    assert (found.totals.incomplete, found.totals.guest_sent_bytes) == (1, 0)


async def test_a_reading_that_cannot_be_committed_is_counted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START)
        run_guest(worker)
        put = worker.journal.records.put_instance

        async def full(record: InstanceRecord, **more: Any) -> None:
            if record.metering is not None and record.metering.reading is not None:
                raise HostFault("the disk is full")
            await put(record, **more)

        monkeypatch.setattr(worker.journal.records, "put_instance", full)
        await run_all(worker, STOP)
        (found,) = await used(worker)

    assert found.launch is not None
    assert found.launch.cpu_us == 1_500_000


async def test_the_totals_of_a_released_instance_are_in_its_last_event(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START)
        run_guest(worker)
        await run_all(worker, STOP)
        detail: dict[str, Any] = {"status": "stopped", "launch": 1, "jails": [], "pids": []}
        await worker.journal.records.release_instance(REF, reason="given up", detail=detail)

        (gone,) = [event for event in await events(worker) if event.to == "released"]

    assert gone.detail["totals"]["cpu_us"] == 1_500_000


async def test_a_record_from_before_is_counted_from_now_on(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START)
        await worker.journal.records.put_instance(replace(worker.record(), metering=None))
        run_guest(worker)
        await run_all(worker, STOP)
        (found,) = await used(worker)

    assert found.launch is not None
    assert (found.launch.cpu_us, found.span.began_ms, found.span.duration_ms) == (
        1_500_000,
        None,
        None,
    )


async def test_the_rest_before_an_adopted_launch_is_not_counted_again(tmp_path: Path) -> None:
    """The metadata of a jail has the record of before the launch, its rest included."""
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, START, SLEEP, WAKE)
        rest = Rest(State.SLEEPING, worker.host.facts.moment())
        adopted = replace(worker.record(), metering=Metering(rest=rest))
        await worker.journal.records.put_instance(adopted)
        before = len(await used(worker))
        run_guest(worker)
        await run_all(worker, STOP)

        (found,) = (await used(worker))[before:]

    assert (found.span.state, found.span.duration_ms) == ("running", None)
    assert found.totals.sleeping_ms == 0


@pytest.mark.parametrize(
    ("until", "want"),
    [
        (Moment(0, 7_000, "b1"), (2_000, Clock.BOOT)),  # the wall clock was set back
        (Moment(1 << 50, 7_000, "b1"), (2_000, Clock.BOOT)),
        (Moment(60_000, 4_000, "b2"), (50_000, Clock.WALL)),
        (Moment(0, 4_000, "b2"), (4_000, Clock.WALL)),  # not shorter than this boot is old
        (Moment(1 << 52, 4_000, "b2"), (SPAN_MAX_MS, Clock.WALL)),
    ],
)
def test_a_rest_is_measured_by_a_clock_that_nobody_sets_unless_a_reboot_is_in_it(
    until: Moment, want: tuple[int, Clock]
) -> None:
    record = replace(
        record_of(status=Status.SLEEPING),
        metering=Metering(rest=Rest(State.SLEEPING, Moment(10_000, 5_000, "b1"))),
    )

    found = metering.settled(record, Status.STOPPED, until)

    (due,) = found.due
    assert (due.span.duration_ms, due.span.clock) == want
    assert found.totals.by_wall_clock_ms == (want[0] if want[1] is Clock.WALL else 0)
    assert found.rest == Rest(State.STOPPED, until)
