"""What a worker does first, over a host in memory: restore, adopt, quarantine, forget."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.errors import HostFault
from schemas import codec
from schemas.codes import Code
from schemas.records import InstanceRecord, Status, VmmIdentity
from schemas.requests import Request, SetupNetwork, SleepInstance
from schemas.usage import State, UsageDetail
from tests.constants import REF, START, WAKE
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import FakeJailLayout, recovery
from tests.unit.instance.test_metering import used
from worker.reconcile.recovery import Counts

UP = SetupNetwork("acme", seeded().tenants["acme"].net)
SLEEP = SleepInstance("acme", "web", "i-1", force=True)


async def started(path: Path, machine: FakeHost, *more: SleepInstance) -> None:
    """The life of a first worker: it recovers, runs these commands and is killed."""
    async with memory_worker(path, machine) as worker:
        await recovery(worker).run()
        requests: tuple[Request, ...] = (UP, START, *more)
        for request in requests:
            assert (await worker.run(request)).code is Code.OK


async def woken_partway(path: Path, machine: FakeHost) -> list[UsageDetail]:
    """The life of a first worker, which is killed after a Wake consumed the snapshot and before it
    ended, as the journal has it. Returns what was published."""
    at_launch: list[InstanceRecord] = []

    async def look(moment: str) -> None:
        if moment == "after:consumed":
            at_launch.append(worker.record())

    async with memory_worker(path, machine, failpoint=look) as worker:
        await recovery(worker).run()
        for request in (UP, START, SLEEP, WAKE):
            assert (await worker.run(request)).code is Code.OK
        (record,) = at_launch
        assert record.status is Status.WAKING
        await worker.journal.records.put_instance(record, durable=True)
        return await used(worker)


async def event_kinds(worker: MemoryWorker) -> list[str]:
    rows = await worker.journal.outbox.pending("event", 1000)
    return [str(codec.decode_event(row.payload).kind) for row in rows]


async def test_a_vmm_that_is_as_recorded_is_adopted(tmp_path: Path) -> None:
    machine = seeded()
    await started(tmp_path / "j", machine)
    before = dict(machine.resources)

    async with memory_worker(tmp_path / "j", machine) as worker:
        counts = await recovery(worker).run()
        await worker.lanes.idle()

        assert counts == Counts(adopted=1, networks=1)
        assert worker.record().status is Status.RUNNING
        assert machine.resources == before


async def test_a_paused_vmm_without_a_snapshot_is_resumed(tmp_path: Path) -> None:
    machine = seeded()
    await started(tmp_path / "j", machine)
    (guest,) = machine.guests.values()
    guest.state = "Paused"

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()

        assert guest.state == "Running"


async def test_a_vmm_that_differs_from_its_record_is_quarantined_not_killed(
    tmp_path: Path,
) -> None:
    machine = seeded()
    await started(tmp_path / "j", machine)
    ((key, identity),) = [item for item in machine.resources.items() if item[0][0] == "vmm"]
    machine.resources[key] = replace(identity, pid=identity.pid + 1)

    async with memory_worker(tmp_path / "j", machine) as worker:
        counts = await recovery(worker).run()

        assert (counts.adopted, counts.quarantined) == (0, 1)
        assert worker.record().status is Status.UNKNOWN
        assert "quarantined" in await event_kinds(worker)
        assert key in machine.resources


async def test_a_vmm_that_exited_while_no_worker_ran_is_cleaned_up(tmp_path: Path) -> None:
    machine = seeded()
    await started(tmp_path / "j", machine)
    (jail_id,) = machine.guests
    machine.kill(jail_id)

    async with memory_worker(tmp_path / "j", machine) as worker:
        counts = await recovery(worker).run()
        await worker.lanes.idle()

        assert counts.ended == 1
        assert worker.record().status is Status.FAILED
        assert ("jail", jail_id) not in machine.resources


async def test_a_wake_that_ended_partway_ends_the_sleep_before_it(tmp_path: Path) -> None:
    machine = seeded()
    before = await woken_partway(tmp_path / "j", machine)
    (asleep,) = [each for each in before if each.span.state is State.SLEEPING]

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        metering, last = worker.record().metering, (await used(worker))[-1]

        assert worker.record().status is Status.RUNNING
    assert metering is not None
    assert (metering.rest, metering.due) == (None, ())
    assert last == asleep


async def test_a_sleep_is_published_once_though_the_woken_vmm_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = seeded()
    before = await woken_partway(tmp_path / "j", machine)

    async with memory_worker(tmp_path / "j", machine) as worker:
        launched = worker.record().vmm
        assert launched is not None
        other = replace(launched, start_ticks=424242)

        async def find(_jail_id: str) -> VmmIdentity | None:
            return other

        monkeypatch.setattr(worker.host.vmms, "find", find)
        await recovery(worker).run()

        assert worker.record().status is Status.UNKNOWN
        assert len(await used(worker)) == len(before) + 1


async def test_after_a_reboot_an_instance_is_stopped_and_its_network_restored(
    tmp_path: Path,
) -> None:
    machine = seeded()
    await started(tmp_path / "j", machine)
    (jail_id,) = machine.guests
    machine.reboot("00000000-0000-4000-8000-000000000002")

    async with memory_worker(tmp_path / "j", machine) as worker:
        counts = await recovery(worker).run()

        record = worker.record()
        assert (counts.ended, counts.networks) == (1, 1)
        assert (record.status, record.vmm, record.uid_slot) == (Status.STOPPED, None, None)
        assert ("jail", jail_id) not in machine.resources
        assert ("bridge", "br-tenant-3") in machine.resources
        assert ("data_disk", str(REF)) in machine.resources


async def test_an_instance_that_cannot_be_recovered_does_not_stop_the_recovery(
    tmp_path: Path,
) -> None:
    machine = seeded()
    await started(tmp_path / "j", machine)
    machine.reboot("00000000-0000-4000-8000-000000000002")
    machine.fail["remove_jail"] = HostFault("the disk does not answer")

    async with memory_worker(tmp_path / "j", machine) as worker:
        counts = await recovery(worker).run()

        assert (counts.failed, counts.ended) == (1, 0)
        assert worker.record().status is Status.RUNNING
        assert (await event_kinds(worker))[-1] == "recovered"


@pytest.mark.parametrize("proven", [True, False])
async def test_a_vmm_of_a_lost_journal_is_adopted_only_on_proof(
    tmp_path: Path, proven: bool
) -> None:
    machine = seeded()
    await started(tmp_path / "lost", machine)
    if not proven:
        machine.fail["check_confinement"] = HostFault("not confined as launched")

    async with memory_worker(tmp_path / "new", machine) as worker:
        counts = await recovery(worker).run()

        expected = Status.RUNNING if proven else Status.UNKNOWN
        assert (counts.adopted, counts.quarantined) == (int(proven), int(not proven))
        assert worker.record().status is expected
        assert worker.journal.records.network("acme") is not None
        assert len(machine.guests) == 1


async def test_a_vmm_of_a_lost_journal_that_was_paused_for_a_sleep_runs_again(
    tmp_path: Path,
) -> None:
    machine = seeded()
    await started(tmp_path / "lost", machine)
    (guest,) = machine.guests.values()
    guest.state = "Paused"

    async with memory_worker(tmp_path / "new", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()

        assert (worker.record().status, guest.state) == (Status.RUNNING, "Running")


async def test_a_vmm_of_a_lost_journal_whose_snapshot_is_published_stays_asleep(
    tmp_path: Path,
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "lost", machine) as worker:
        await recovery(worker).run()
        for request in (UP, START):
            assert (await worker.run(request)).code is Code.OK
        machine.fail["remove_vmm"] = HostFault("injected")
        assert (await worker.run(SLEEP)).code is Code.HOST_FAULT
    machine.fail.clear()
    (guest,) = machine.guests.values()

    async with memory_worker(tmp_path / "new", machine) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()
        assert (worker.record().status, guest.state) == (Status.SNAPSHOTTING, "Paused")
        after: tuple[Request, ...] = (SLEEP, WAKE)
        for command in after:
            assert (await worker.run(command)).code is Code.OK

        assert worker.record().status is Status.RUNNING


async def test_a_vmm_whose_jail_has_no_metadata_is_reported_and_left_running(
    tmp_path: Path,
) -> None:
    machine = seeded()
    await started(tmp_path / "lost", machine)
    (jail_id,) = machine.guests
    jails = FakeJailLayout(machine)
    jails.damaged.add(jail_id)

    async with memory_worker(tmp_path / "new", machine) as worker:
        counts = await recovery(worker, jails).run()

        assert counts.quarantined == 1
        assert worker.journal.records.instance(REF) is None
        assert await event_kinds(worker) == ["quarantined", "recovered"]
        assert ("vmm", jail_id) in machine.resources


async def test_an_unfinished_hash_is_computed_by_the_next_worker_and_only_once(
    tmp_path: Path,
) -> None:
    machine = seeded()
    await started(tmp_path / "j", machine, SLEEP)
    machine.later.clear()  # as a shutdown does

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        (hash_memory,) = machine.later
        await hash_memory()
        machine.later.clear()
        await recovery(worker).run()

        assert machine.later == []
