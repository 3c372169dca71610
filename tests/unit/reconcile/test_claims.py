"""`adopt` and `release`: what is proved, what is refused, and that nothing is ever killed."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.claims.facts import Fact
from handlers.claims.look import look_for_unrecorded
from handlers.claims.unrecorded import UnrecordedVmm, VmmProcess
from handlers.errors import Conflict, Failure, HostFault, NotFound, Unavailable
from handlers.specs import LaunchSpec
from schemas import codec, naming
from schemas.codes import Code
from schemas.envelopes import Event, Reply
from schemas.records import DiskIdentity, Status
from schemas.requests import Error, InstanceRef, Request, SetupNetwork, StartInstance
from schemas.settings import VmmSettings
from tests.constants import NET, REF, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, Gate, instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import reconciled, recovery, vmm_watch
from worker.reconcile.claims import Claims

UP = SetupNetwork("acme", NET)
OTHER = InstanceRef("acme", "web", "i-2")
JAIL = naming.jail_id(REF, 1)


async def lived(path: Path, machine: FakeHost, *requests: Request) -> None:
    """A worker runs these commands and is killed."""
    async with memory_worker(path, machine) as worker:
        await recovery(worker).run()
        for request in (UP, *requests):
            assert (await worker.run(request)).code is Code.OK


def message_of(reply: Reply) -> str:
    assert isinstance(reply.response, Error)
    return reply.response.message


def claims(worker: MemoryWorker) -> Claims:
    watch = vmm_watch(worker)
    return Claims(worker.host, worker.journal, worker.lanes, ready=lambda: True, after=watch.sync)


async def events(worker: MemoryWorker, kind: str) -> list[Event]:
    rows = await worker.journal.outbox.pending("event", 1000)
    found = [codec.decode_event(row.payload) for row in rows]
    return [event for event in found if event.kind == kind]


def change_identity(machine: FakeHost) -> None:
    identity = machine.resources["vmm", JAIL]
    machine.resources["vmm", JAIL] = replace(identity, exe_ino=identity.exe_ino + 1)


async def test_a_quarantined_vmm_that_is_proven_runs_again(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "j", machine, START)
    change_identity(machine)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        assert worker.record().status is Status.UNKNOWN
        assert (await worker.run(STOP)).code is Code.CONFLICT
        before = dict(machine.resources)

        outcome = await claims(worker).adopt(REF)
        again = await claims(worker).adopt(REF)

        assert (outcome.changed, outcome.status) == (True, "running")
        assert (again.changed, again.status) == (False, "running")
        assert machine.resources == before
        assert worker.record().vmm == machine.resources["vmm", JAIL]
        unproven = {fact.name: fact.found for fact in outcome.facts if not fact.proven}
        assert unproven == {"identity in the journal": "the journal has exe_ino 1"}
        (event,) = [each for each in await events(worker, "recovered") if each.instance_id]
        assert event.detail["status"] == "running"
        assert [each["fact"] for each in event.detail["not_proved"]] == ["identity in the journal"]
        assert (await worker.run(STOP)).code is Code.OK


async def test_a_quarantined_instance_whose_vmm_ended_is_stopped_and_starts_again(
    tmp_path: Path,
) -> None:
    machine = seeded()
    await lived(tmp_path / "j", machine, START)
    change_identity(machine)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        machine.kill(JAIL)

        outcome = await claims(worker).adopt(REF)

        assert (outcome.changed, outcome.status) == (True, "stopped")
        record = worker.record()
        assert (record.status, record.uid_slot, record.vmm) == (Status.STOPPED, None, None)
        assert record.disk == machine.resources["data_disk", str(REF)]
        assert not [key for key in machine.resources if key[0] in ("tap", "pin", "jail", "cgroup")]
        assert (await worker.run(START)).code is Code.OK


async def test_a_data_disk_without_a_record_is_recorded(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "lost", machine, START, STOP)
    async with memory_worker(tmp_path / "new", machine) as worker:
        await recovery(worker).run()
        assert worker.journal.records.instance(REF) is None

        outcome = await claims(worker).adopt(REF)
        again = await claims(worker).adopt(REF)

        assert (outcome.changed, outcome.status) == (True, "stopped")
        assert (again.changed, again.status) == (False, "stopped")
        assert worker.record().disk == machine.resources["data_disk", str(REF)]


async def test_another_disk_than_the_recorded_one_is_refused(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "j", machine, START, STOP)
    async with memory_worker(tmp_path / "j", machine) as worker:
        before = worker.record()
        machine.resources["data_disk", str(REF)] = DiskIdentity(1, 999, 16 << 20)

        with pytest.raises(Conflict, match="another file than recorded"):
            await claims(worker).adopt(REF)

        assert worker.record() == before


async def test_a_recorded_disk_that_is_missing_is_named(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "j", machine, START, STOP)
    async with memory_worker(tmp_path / "j", machine) as worker:
        del machine.resources["data_disk", str(REF)]

        with pytest.raises(Conflict, match="recorded data disk is missing"):
            await claims(worker).adopt(REF)


async def test_what_neither_journal_nor_files_know_is_not_found(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        with pytest.raises(NotFound):
            await claims(worker).adopt(OTHER)


def unconfined(machine: FakeHost) -> None:
    machine.fail["check_confinement"] = HostFault("uid is 0, expected 2000000000")


def not_started(machine: FakeHost) -> None:
    machine.guests[JAIL].state = "Not started"


def foreign_tap(machine: FakeHost) -> None:
    tap = machine.resources["tap", "tn3i5"]
    machine.resources["tap", "tn3i5"] = type(tap)(
        tap.name, tap.bridge, tap.owner_uid + 9, tap.mac, tap.guest_ip, tap.alias
    )


def two_vmms(machine: FakeHost) -> None:
    machine.resources["jail", naming.jail_id(REF, 2)] = machine.resources["jail", JAIL]
    machine.put_vmm(LaunchSpec(naming.jail_id(REF, 2), VmmSettings().uid_base + 7, "c"))


def without_metadata(machine: FakeHost) -> None:
    machine.no_metadata.add(JAIL)


def open_disk(machine: FakeHost) -> None:
    machine.unproven_disk.append(Fact("use", False, "open by process 77"))


def second_process(machine: FakeHost) -> None:
    machine.stray.append(VmmProcess(77, 1, machine.uids[JAIL], None, "elsewhere", 1))


def no_vmm_but_a_process(machine: FakeHost) -> None:
    machine.kill(JAIL)
    machine.foreign_in_cgroup.add(JAIL)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (unconfined, "uid is 0"),
        (not_started, "Not started"),
        (foreign_tap, "tn3i5 is of acme/web/i-1 and uid"),
        (two_vmms, "VMMs run in 2 of its jails"),
        (without_metadata, "no metadata"),
        (open_disk, "open by process 77"),
        (second_process, "by process 77"),
        (no_vmm_but_a_process, "none is the VMM"),
    ],
)
async def test_without_a_required_fact_nothing_is_adopted_and_nothing_changes(
    tmp_path: Path, damage: Callable[[FakeHost], None], reason: str
) -> None:
    machine = seeded()
    await lived(tmp_path / "lost", machine, START)
    async with memory_worker(tmp_path / "new", machine) as worker:
        assert (await worker.run(UP)).code is Code.OK
        damage(machine)
        before = dict(machine.resources)

        with pytest.raises(Conflict, match=reason) as refused:
            await claims(worker).adopt(REF)

        assert refused.value.detail["not_proved"]
        assert worker.journal.records.instance(REF) is None
        assert machine.resources == before


async def test_without_any_damage_the_same_vmm_is_adopted(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "lost", machine, START)
    async with memory_worker(tmp_path / "new", machine) as worker:
        outcome = await claims(worker).adopt(REF)

        assert (outcome.changed, outcome.status) == (True, "running")
        assert worker.journal.records.network("acme") is not None
        assert {fact.name for fact in outcome.facts if fact.proven} >= {
            "process",
            "jail metadata",
            "confinement",
            "guest",
            "TAP",
            "pins",
            "data disk",
        }


async def test_a_vmm_whose_uid_another_instance_has_by_now_is_refused(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "lost", machine, START)
    async with memory_worker(tmp_path / "new", machine) as worker:
        slot = machine.uids[JAIL] - VmmSettings().uid_base
        taken = replace(
            machine.resources["jail", JAIL].record, ref=OTHER, uid_slot=slot, offset=None
        )
        await worker.journal.records.put_instance(taken)

        with pytest.raises(Conflict, match="uid is free: slot 0 belongs to acme/web/i-2"):
            await claims(worker).adopt(REF)


async def test_a_paused_vm_whose_sleep_did_not_happen_is_resumed(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "lost", machine, START)
    machine.guests[JAIL].state = "Paused"
    async with memory_worker(tmp_path / "new", machine) as worker:
        await claims(worker).adopt(REF)

        assert machine.guests[JAIL].state == "Running"


async def test_a_released_vmm_runs_on_and_books_what_it_holds(tmp_path: Path) -> None:
    machine = seeded()
    machine.files[OTHER] = instance_file(OTHER, 5)
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START):
            assert (await worker.run(request)).code is Code.OK
        uid = machine.uids[JAIL]
        before = dict(machine.resources)

        outcome = await claims(worker).release(REF)
        again = await claims(worker).release(REF)

        assert (outcome.changed, again.changed) == (True, False)
        assert worker.journal.records.instance(REF) is None
        assert machine.resources == before
        assert (await events(worker, "status"))[-1].to == "released"
        (event,) = await events(worker, "released")
        assert event.detail["jails"] == [JAIL]
        # Neither the instance itself, nor one with its address, is started beside it.
        assert "is in no record" in message_of(await worker.run(START))
        taken = await worker.run(StartInstance("acme", "web", "i-2"))
        assert (taken.code, "has TAP tn3i5" in message_of(taken)) == (Code.CONFLICT, True)
        machine.files[OTHER] = instance_file(OTHER, 6)
        assert (await worker.run(StartInstance("acme", "web", "i-2"))).code is Code.OK
        assert machine.uids[naming.jail_id(OTHER, 1)] != uid
        assert ("vmm", JAIL) in machine.resources


async def test_the_memory_of_a_released_vmm_is_not_given_to_another(tmp_path: Path) -> None:
    machine = seeded()
    machine.files[OTHER] = instance_file(OTHER, 6)
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START):
            assert (await worker.run(request)).code is Code.OK
        await claims(worker).release(REF)
        limits = worker.host.settings.limits
        machine.memory_mib = limits.mem_reserve_mib + 128 + limits.vmm_overhead_mib + 129

        reply = await worker.run(StartInstance("acme", "web", "i-2"))

        assert reply.code is Code.EXHAUSTED  # 130 MiB are the released VMM's
        machine.memory_mib += 1
        assert (await worker.run(StartInstance("acme", "web", "i-2"))).code is Code.OK


async def test_only_an_operator_takes_a_released_vmm_back(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "j", machine, START)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await claims(worker).release(REF)
    async with memory_worker(tmp_path / "j", machine) as worker:
        counts = await recovery(worker).run()
        assert (counts.adopted, counts.quarantined) == (0, 0)
        assert worker.journal.records.instance(REF) is None

        outcome = await claims(worker).adopt(REF)

        assert (outcome.changed, outcome.status) == (True, "running")
        assert JAIL not in machine.released_jails
        assert worker.host.unrecorded.vmms == ()
        for request in (SLEEP, WAKE, STOP):
            assert (await worker.run(request)).code is Code.OK


async def test_a_released_vmm_that_has_ended_holds_nothing_any_more(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START):
            assert (await worker.run(request)).code is Code.OK
        await claims(worker).release(REF)
        assert (await worker.run(START)).code is Code.CONFLICT

        machine.kill(JAIL)

        assert (await worker.run(START)).code is Code.OK
        assert worker.host.unrecorded.vmms == ()


async def test_a_vmm_of_another_hostd_on_this_machine_is_not_this_ones(tmp_path: Path) -> None:
    machine = seeded()
    uid = VmmSettings().uid_base + 9
    machine.stray = [
        VmmProcess(77, 1, uid, None, "hostd-other/acme/0123456789ab-1", 1),
        VmmProcess(78, 1, uid, None, "hostd/acme/0123456789ab-1", 1),
        VmmProcess(79, 1, uid, JAIL, "elsewhere", 1),
    ]
    async with memory_worker(tmp_path / "j", machine) as worker:
        found = await look_for_unrecorded(worker.host)

        assert [each.process.pid for each in found] == [78, 79]


async def test_a_release_that_is_cut_before_its_commit_keeps_the_instance(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "j", machine, START)
    machine.fail_late["set_released"] = HostFault("killed here")
    async with memory_worker(tmp_path / "j", machine) as worker:
        with pytest.raises(HostFault):
            await claims(worker).release(REF)
    machine.fail_late.clear()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        assert worker.record().status is Status.RUNNING

        assert (await claims(worker).release(REF)).changed


async def test_a_sleeping_instance_is_neither_released_nor_adopted(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START, SLEEP):
            assert (await worker.run(request)).code is Code.OK

        with pytest.raises(Conflict, match="cannot release it"):
            await claims(worker).release(REF)
        outcome = await claims(worker).adopt(REF)

        assert (outcome.changed, outcome.status) == (False, "sleeping")
        assert (await worker.run(WAKE)).code is Code.OK


async def test_an_adoption_waits_for_the_command_that_runs_in_the_lane(tmp_path: Path) -> None:
    machine = seeded()
    gate = machine.gates["drain_guest"] = Gate()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START):
            assert (await worker.run(request)).code is Code.OK
        sleeping = await worker.send(SLEEP)

        adopting = asyncio.create_task(claims(worker).adopt(REF))
        releasing = asyncio.create_task(claims(worker).release(REF))
        await asyncio.sleep(0)
        gate.opened.set()

        assert (await adopting).status == "sleeping"
        with pytest.raises(Conflict):
            await releasing
        assert (await worker.reply(sleeping)).code is Code.OK


async def test_while_the_worker_recovers_nothing_is_claimed(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        recovering = Claims(
            worker.host, worker.journal, worker.lanes, ready=lambda: False, after=lambda ref: None
        )

        for claim in (recovering.adopt, recovering.release):
            with pytest.raises(Unavailable, match="still recovering"):
                await claim(REF)


async def test_an_instance_whose_record_cannot_be_read_is_left_to_the_version_that_can(
    tmp_path: Path,
) -> None:
    machine = seeded()
    await lived(tmp_path / "j", machine, START)
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as file, file:
        file.execute("UPDATE instance SET record = '{}'")
    before = dict(machine.resources)
    async with memory_worker(tmp_path / "j", machine) as worker:
        for claim in (claims(worker).adopt, claims(worker).release):
            with pytest.raises(Failure):
                await claim(REF)
        made = reconciled(worker)
        for _ in range(3):
            assert await made.sweep.now(dry_run=False) == []
            made.now_s += 60

        assert machine.resources == before
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as file:
        assert file.execute("SELECT record FROM instance").fetchone() == ("{}",)


async def test_the_row_of_a_network_that_cannot_be_read_is_not_written_over(
    tmp_path: Path,
) -> None:
    """By `adopt`, nor by a start that finds the VMM of a record that is gone."""
    machine = seeded()
    await lived(tmp_path / "j", machine, START)
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as file, file:
        file.execute("UPDATE network SET record = '{}'")
        file.execute("DELETE FROM instance")
    async with memory_worker(tmp_path / "j", machine) as worker:
        with pytest.raises(HostFault, match=r"network\.acme"):
            await claims(worker).adopt(REF)

        assert (await recovery(worker).run()).adopted == 1
        assert worker.record().status is Status.RUNNING
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as file:
        assert file.execute("SELECT record FROM network").fetchone() == ("{}",)


async def test_a_vmm_whose_record_cannot_be_read_books_its_memory(tmp_path: Path) -> None:
    machine = seeded()
    await lived(tmp_path / "j", machine, START)
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as file, file:
        file.execute("UPDATE instance SET record = '{}'")
    async with memory_worker(tmp_path / "j", machine) as worker:
        (found,) = await look_for_unrecorded(worker.host)

        assert worker.host.unrecorded.usage.mem_mib == found.process.size_mib > 0


async def test_a_launch_looks_again_only_for_the_vmm_that_would_refuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []

    async def no_processes() -> list[VmmProcess]:
        looks.append(True)
        return []

    async with memory_worker(tmp_path / "j", seeded()) as worker:
        assert (await worker.run(UP)).code is Code.OK
        monkeypatch.setattr(worker.host.vmms, "processes", no_processes)
        for jail_id, expected in (("0" * 12 + "-1", 0), (naming.jail_id(REF, 7), 1)):
            stray = VmmProcess(4_000_000, 1, 1, jail_id, "hostd/acme", 130)
            worker.host.unrecorded.set([UnrecordedVmm(stray)])
            reply = await worker.run(START)

            assert (reply.code, len(looks)) == (Code.OK, expected)
            await worker.run(STOP)
