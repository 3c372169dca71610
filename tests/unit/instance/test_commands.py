"""The commands over a host in memory: statuses, idempotence, undo, completion after a cut.

The one test that matters most: every command x every effect made to fail x {first run, replay}:
the host is as before, or the reply names the rest; past a point of no return it is completed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.clock import now_ms
from handlers.errors import HostFault, Invalid, Unavailable
from handlers.registry import HANDLERS
from schemas import codec, naming
from schemas.codes import Code
from schemas.envelopes import Reply
from schemas.files import InstanceResources, PoolSpec, TenantConfig
from schemas.records import Status
from schemas.requests import (
    DestroyInstance,
    Error,
    InstanceRef,
    Request,
    SetupNetwork,
    StartInstance,
    TeardownNetwork,
    TenantNet,
)
from schemas.settings import LimitSettings, VmmSettings
from tests.constants import DESTROY, NET, REF, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, Gate, instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker

KEEP = DestroyInstance("acme", "web", "i-1", wipe_volumes=False)
UP = SetupNetwork("acme", NET)
DOWN = TeardownNetwork("acme", NET)

BEFORE: dict[str, tuple[Request, ...]] = {
    "SetupNetwork": (),
    "TeardownNetwork": (UP,),
    "StartInstance": (UP,),
    "StopInstance": (UP, START),
    "SleepInstance": (UP, START),
    "WakeInstance": (UP, START, SLEEP),
    "DestroyInstance": (UP, START),
}
COMMANDS = {request.kind: request for request in (UP, DOWN, START, STOP, SLEEP, WAKE, DESTROY)}

UNDONE: dict[str, tuple[str, ...]] = {
    "SetupNetwork": ("prepare_network", "tenant_rules", "bridge"),
    "StartInstance": (
        "flush_conntrack",
        "artifact",
        "cgroup",
        "pin",
        "tap",
        "data_disk",
        "jail",
        "vmm",
        "configure_vm",
        "start_vm",
        "check_confinement",
        "wait_agent",
    ),
    "SleepInstance": ("pause", "create_snapshot", "seal", "publish_snapshot"),
    "WakeInstance": (
        "artifact",
        "cgroup",
        "pin",
        "tap",
        "data_disk",
        "jail",
        "vmm",
        "verify_snapshot",
        "link_snapshot",
        "load_snapshot",
        "check_confinement",
    ),
}
COMPLETED: dict[str, tuple[str, ...]] = {
    "TeardownNetwork": ("remove_bridge", "remove_tenant_rules"),
    "StopInstance": (
        "remove_vmm",
        "remove_tap",
        "flush_conntrack",
        "remove_pin",
        "remove_jail",
        "remove_cgroup",
        "discard_snapshot",
    ),
    "SleepInstance": (
        "remove_vmm",
        "remove_tap",
        "remove_pin",
        "remove_jail",
        "remove_cgroup",
        "discard_snapshot",
    ),
    "WakeInstance": ("mark_consumed", "resume_vm"),
    "DestroyInstance": (
        "remove_vmm",
        "remove_tap",
        "flush_conntrack",
        "remove_pin",
        "remove_jail",
        "remove_cgroup",
        "discard_snapshot",
        "wipe_volumes",
        "remove_files",
        "remove_artifact",
    ),
}
# What may fail without failing the command: reported in the reply.
REPORTED: dict[str, tuple[str, ...]] = {
    "StartInstance": ("update_instance",),
    "StopInstance": ("update_instance",),
    "SleepInstance": ("drain_guest", "update_instance"),
    "WakeInstance": ("wake_agent", "set_clock", "update_instance"),
}


def cases(table: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(kind, effect) for kind, effects in table.items() for effect in effects]


async def prepare(worker: MemoryWorker, kind: str) -> None:
    for request in BEFORE[kind]:
        reply = await worker.run(request)
        assert reply.code is Code.OK, (request, reply)


def test_every_command_with_a_handler_is_in_the_tables() -> None:
    assert {type(request) for request in COMMANDS.values()} == HANDLERS.keys()
    assert COMMANDS.keys() == BEFORE.keys() == MOMENTS.keys()
    assert COMMANDS.keys() == UNDONE.keys() | COMPLETED.keys()


@pytest.mark.parametrize("kind", COMMANDS)
async def test_the_tables_of_effects_are_complete(kind: str, tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, kind)
        machine.seen.clear()

        reply = await worker.run(COMMANDS[kind])

        assert reply.code is Code.OK, reply
        listed = {e for table in (UNDONE, COMPLETED, REPORTED) for e in table.get(kind, ())}
        cleaning: set[str] = {"remove_jail"} if kind in ("StartInstance", "WakeInstance") else set()
        assert set(machine.seen) - cleaning == listed


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("kind", "effect"), cases(UNDONE))
async def test_a_failed_step_leaves_the_host_as_it_was(
    kind: str, effect: str, late: bool, tmp_path: Path
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, kind)
        before, status = dict(machine.resources), status_of(worker)
        guests = {k: g.state for k, g in machine.guests.items()}
        (machine.fail_late if late else machine.fail)[effect] = HostFault("injected")

        reply = await worker.run(COMMANDS[kind])

        assert reply.code is Code.HOST_FAULT
        assert reply.left_behind == ()
        assert machine.resources == before
        assert {k: g.state for k, g in machine.guests.items()} == guests
        assert status_of(worker) == status
        machine.fail.clear()
        machine.fail_late.clear()
        again = await worker.run(COMMANDS[kind])
        assert again.code is Code.OK, again


@pytest.mark.parametrize(("kind", "effect"), cases(COMPLETED))
async def test_past_the_point_of_no_return_a_new_command_completes_a_failed_one(
    kind: str, effect: str, tmp_path: Path
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, kind)
        machine.fail[effect] = HostFault("injected")
        assert (await worker.run(COMMANDS[kind])).code is Code.HOST_FAULT
        machine.fail.clear()

        reply = await worker.run(COMMANDS[kind])

        assert reply.code is Code.OK, reply
        assert shape(machine) == shape(await undisturbed(tmp_path, kind))


@pytest.mark.parametrize(("kind", "effect"), cases(COMPLETED))
async def test_past_the_point_of_no_return_the_next_worker_completes_the_command(
    kind: str, effect: str, tmp_path: Path
) -> None:
    machine = seeded()
    patient = LimitSettings(retry_budget_s=3_600.0)
    async with memory_worker(tmp_path / "j", machine, limits=patient) as worker:
        await prepare(worker, kind)
        machine.fail[effect] = HostFault("injected")
        command_id = await worker.send(COMMANDS[kind])
        await asyncio.wait_for(failed_once(machine, effect), 10)
        await worker.kill()
    machine.fail.clear()

    async with memory_worker(tmp_path / "j", machine) as worker:
        reply = await worker.reply(command_id)

        assert reply.code is Code.OK, reply
        assert shape(machine) == shape(await undisturbed(tmp_path, kind))


async def test_the_memory_is_hashed_after_the_outcome(tmp_path: Path) -> None:
    machine = seeded()
    unfinished: list[bool] = []
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "SleepInstance")

        class Noted(list[Callable[[], Awaitable[None]]]):
            def append(self, work: Callable[[], Awaitable[None]]) -> None:
                unfinished.append(worker.journal.commands.is_unfinished("asleep"))
                super().append(work)

        machine.later = Noted()
        await worker.run(SLEEP, "asleep")
        (hashing,) = machine.later
        await hashing()

        assert unfinished == [False]
        assert await worker.host.snapshots.is_hashed(REF, 1)


async def test_a_teardown_waits_for_the_taps_that_a_stop_released(tmp_path: Path) -> None:
    machine = seeded()
    machine.slow_taps = True
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "StopInstance")
        assert (await worker.run(STOP)).code is Code.OK
        assert ("tap", "tn3i5") in machine.resources

        reply = await worker.run(DOWN)

        assert reply.code is Code.OK, reply
        assert not [key for key in machine.resources if key[0] in ("tap", "bridge")]


async def test_a_destroyed_instance_has_no_tap_however_slow_the_kernel_is(tmp_path: Path) -> None:
    machine = seeded()
    machine.slow_taps = True
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "DestroyInstance")

        assert (await worker.run(DESTROY)).code is Code.OK

        assert ("tap", "tn3i5") not in machine.resources


async def undisturbed(tmp_path: Path, kind: str) -> FakeHost:
    """A host on which the command succeeded at once."""
    machine = seeded()
    async with memory_worker(tmp_path / "undisturbed", machine) as worker:
        await prepare(worker, kind)
        assert (await worker.run(COMMANDS[kind])).code is Code.OK
    return machine


@pytest.mark.parametrize(("kind", "effect"), cases(REPORTED))
async def test_a_failure_that_stops_nothing_is_reported_in_the_reply(
    kind: str, effect: str, tmp_path: Path
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, kind)
        machine.fail[effect] = Unavailable("injected")

        reply = await worker.run(COMMANDS[kind])

        assert reply.code is Code.OK
        reported = " ".join([*reply.left_behind, *map(str, reply.detail.values())])
        assert "injected" in reported or "no_answer" in reported


@pytest.mark.parametrize(("kind", "effect"), cases(UNDONE))
async def test_what_cannot_be_undone_is_named(kind: str, effect: str, tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, kind)
        before = dict(machine.resources)
        machine.fail[effect] = HostFault("injected")
        for name in ("tap", "cgroup", "jail", "tenant_rules"):
            machine.fail[f"remove_{name}"] = HostFault("stuck")
        if kind in ("StartInstance", "WakeInstance"):
            machine.fail.pop("remove_jail")

        reply = await worker.run(COMMANDS[kind])

        assert reply.code is Code.HOST_FAULT
        extra = {f"{name} {key}" for name, key in set(machine.resources) - set(before)}
        assert extra <= set(reply.left_behind)
        rows = [row for rows in worker.journal.steps.leftovers().values() for row in rows]
        assert {f"{row.mechanism} {row.key}" for row in rows} == set(reply.left_behind)


MOMENTS = {
    "SetupNetwork": ("tenant_rules", "bridge"),
    "TeardownNetwork": ("remove_bridge", "remove_tenant_rules"),
    "StartInstance": (
        "reservation",
        "artifact",
        "cgroup",
        "pin",
        "tap",
        "data_disk",
        "jail",
        "vmm",
        "configure_vm",
        "boot",
        "start_vm",
        "wait_agent",
    ),
    "StopInstance": ("stop_vmm", "remove_vmm", "remove_tap", "remove_jail", "discard_snapshot"),
    "SleepInstance": (
        "transition",
        "drain_guest",
        "pause",
        "snapshot_draft",
        "publish_snapshot",
        "remove_vmm",
    ),
    "WakeInstance": (
        "reservation",
        "cgroup",
        "pin",
        "tap",
        "snapshot_use",
        "jail",
        "vmm",
        "verify_snapshot",
        "link_snapshot",
        "load_snapshot",
        "consumed",
        "resume_vm",
        "wake_agent",
    ),
    "DestroyInstance": ("remove_vmm", "remove_jail", "wipe_volumes", "remove_files"),
}


async def test_a_woken_guests_clock_is_set_though_its_agent_fails(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "WakeInstance")
        machine.fail["wake_agent"] = Unavailable("deaf")
        awake = await worker.run(COMMANDS["WakeInstance"])
        await worker.run(COMMANDS["SleepInstance"])
        machine.fail["set_clock"] = Unavailable("slow")
        both = await worker.run(COMMANDS["WakeInstance"])
        await worker.run(COMMANDS["SleepInstance"])
        del machine.fail["wake_agent"]
        clock = await worker.run(COMMANDS["WakeInstance"])
        rows = await worker.journal.outbox.pending("event", 1000)
    events = [codec.decode_event(row.payload) for row in rows]

    assert (awake.code, awake.detail["agent_failed"]) == (Code.OK, "deaf")
    assert awake.detail["clock_was_off_s"] == 0.0
    assert (both.detail["agent_failed"], both.detail["clock_failed"]) == ("deaf", "slow")
    assert {event.command_id: event.reason for event in events if event.reason} == {
        awake.id: "guest agent did not acknowledge the wake",
        both.id: "guest agent did not acknowledge the wake",
        clock.id: "guest's clock was not set",
    }


@pytest.mark.parametrize("edge", ["before", "after"])
@pytest.mark.parametrize(("kind", "step"), cases(MOMENTS))
async def test_a_worker_cut_in_mid_command_ends_it_under_the_same_id(
    kind: str, step: str, edge: str, tmp_path: Path
) -> None:
    machine = seeded()
    reached = asyncio.Event()
    armed = False

    async def stop_there(moment: str) -> None:
        if armed and moment == f"{edge}:{step}":
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", machine, failpoint=stop_there) as worker:
        await prepare(worker, kind)
        armed = True
        command_id = await worker.send(COMMANDS[kind])
        await asyncio.wait_for(reached.wait(), 10)
        await worker.kill()

    async with memory_worker(tmp_path / "j", machine) as worker:
        reply = await worker.reply(command_id)

        assert reply.code is Code.OK, reply
        assert shape(machine) == shape(await undisturbed(tmp_path, kind))
        assert max(machine.boots.values(), default=0) <= 1


async def test_a_vmm_that_ended_while_its_start_was_cut_is_not_booted_again(tmp_path: Path) -> None:
    machine = seeded()
    reached = asyncio.Event()

    async def stop_there(moment: str) -> None:
        if moment == "after:start_vm":
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", machine, failpoint=stop_there) as worker:
        await prepare(worker, "StartInstance")
        before = dict(machine.resources)
        command_id = await worker.send(START)
        await asyncio.wait_for(reached.wait(), 10)
        await worker.kill()
    for jail_id in list(machine.guests):
        machine.kill(jail_id)

    async with memory_worker(tmp_path / "j", machine) as worker:
        reply = await worker.reply(command_id)

        assert reply.code is Code.UNAVAILABLE
        assert machine.resources == before
        assert list(machine.boots.values()) == [1]


async def test_a_vmm_lost_after_its_snapshot_was_consumed_leaves_failed(tmp_path: Path) -> None:
    machine = seeded()
    reached = asyncio.Event()

    async def stop_there(moment: str) -> None:
        if moment == "after:consumed":
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", machine, failpoint=stop_there) as worker:
        await prepare(worker, "WakeInstance")
        command_id = await worker.send(WAKE)
        await asyncio.wait_for(reached.wait(), 10)
        await worker.kill()
    for jail_id in list(machine.guests):
        machine.kill(jail_id)

    async with memory_worker(tmp_path / "j", machine) as worker:
        reply = await worker.reply(command_id)

        assert reply.code is Code.UNAVAILABLE
        assert reply.status == "failed"
        assert reply.detail["vmm_log"] == "log"
        assert not [key for key in machine.resources if key[0].startswith("snapshot")]
        assert (await worker.run(START)).code is Code.OK


TABLE = [
    ((), START, Code.OK, True, "running"),
    ((), STOP, Code.OK, False, "created"),
    ((), SLEEP, Code.CONFLICT, False, "created"),
    ((), WAKE, Code.CONFLICT, False, "created"),
    ((START,), START, Code.OK, False, "running"),
    ((START,), STOP, Code.OK, True, "stopped"),
    ((START,), SLEEP, Code.OK, True, "sleeping"),
    ((START,), WAKE, Code.OK, False, "running"),
    ((START, SLEEP), START, Code.CONFLICT, False, "sleeping"),
    ((START, SLEEP), STOP, Code.OK, True, "stopped"),
    ((START, SLEEP), SLEEP, Code.OK, False, "sleeping"),
    ((START, SLEEP), WAKE, Code.OK, True, "running"),
    ((START, SLEEP), DESTROY, Code.OK, True, "destroyed"),
    ((START, STOP), START, Code.OK, True, "running"),
    ((START, STOP), WAKE, Code.CONFLICT, False, "stopped"),
    ((START, DESTROY), STOP, Code.NOT_FOUND, False, None),
    ((START, DESTROY), DESTROY, Code.OK, False, "destroyed"),
    ((START, KEEP), DESTROY, Code.OK, True, "destroyed"),
]


@pytest.mark.parametrize(("before", "request_", "code", "changed", "status"), TABLE)
async def test_the_table_of_statuses(
    before: tuple[Request, ...],
    request_: Request,
    code: Code,
    changed: bool,
    status: str | None,
    tmp_path: Path,
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        for request in (UP, *before):
            assert (await worker.run(request)).code is Code.OK

        reply = await worker.run(request_)

        assert (reply.code, reply.changed, reply.status) == (code, changed, status)


async def test_a_conflict_names_the_status_that_the_command_wants(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(UP)

        reply = await worker.run(WAKE)

        assert isinstance(reply.response, Error)
        assert reply.response.message == (
            "instance acme/web/i-1 is created: cannot wake it, want sleeping"
        )


async def test_an_instance_that_never_was_is_absent(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        reply = await worker.run(DestroyInstance("acme", "web", "nobody", wipe_volumes=False))

        assert (reply.code, reply.changed) == (Code.OK, False)
        assert reply.detail["absent"] is True


async def test_destroy_works_from_the_journal_when_the_file_is_gone(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        before = dict(machine.resources)
        await worker.run(START)
        del machine.files[REF]

        reply = await worker.run(DESTROY)

        assert reply.code is Code.OK
        assert machine.resources == before


async def test_a_disk_that_cannot_be_wiped_stops_the_destroy_before_anything(
    tmp_path: Path,
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "DestroyInstance")
        before = dict(machine.resources)
        machine.fail["check_wipe"] = Invalid("not hostd's")

        reply = await worker.run(DESTROY)

        assert (reply.code, reply.status, reply.changed) == (Code.INVALID, "running", False)
        assert machine.resources == before
        assert (await worker.run(KEEP)).code is Code.OK


async def test_a_kept_volume_comes_back_with_its_instance(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        await worker.run(START)
        first, disk = worker.record(), machine.resources["data_disk", str(REF)]
        await worker.run(KEEP)
        machine.files[REF] = instance_file(REF, 5)

        reply = await worker.run(START)

        assert reply.code is Code.OK
        assert worker.record().disk == disk == first.disk
        assert worker.record().launch == first.launch + 1


async def test_a_failed_start_reports_the_end_of_the_vmms_log(tmp_path: Path) -> None:
    machine = seeded()
    machine.agent_answers = False
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)

        reply = await worker.run(START)

        assert reply.code is Code.UNAVAILABLE
        assert reply.detail["vmm_log"] == "log"


async def test_a_failed_wake_reports_the_end_of_the_vmms_log(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "WakeInstance")
        machine.fail["load_snapshot"] = HostFault("it does not load")

        reply = await worker.run(WAKE)

        assert (reply.code, reply.detail["vmm_log"]) == (Code.HOST_FAULT, "log")


async def test_a_network_commands_reply_has_no_instances_status(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await prepare(worker, "StopInstance")

        reply = await worker.run(DOWN)

        assert (reply.code, reply.status) == (Code.CONFLICT, None)


async def test_start_needs_the_network(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        reply = await worker.run(START)

        assert reply.code is Code.CONFLICT
        assert worker.journal.records.instance(REF) is None


async def test_an_address_in_use_is_a_conflict_and_free_after_destroy(tmp_path: Path) -> None:
    machine = seeded()
    other = InstanceRef("acme", "web", "i-2")
    machine.files[other] = instance_file(other, 5)
    start_other = StartInstance("acme", "web", "i-2")
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        await worker.run(START)
        await worker.run(SLEEP)

        assert (await worker.run(start_other)).code is Code.CONFLICT
        await worker.run(DESTROY)
        assert (await worker.run(start_other)).code is Code.OK


@pytest.mark.parametrize(
    ("resources", "memory_mib"),
    [
        (InstanceResources(17, 128), 16_384),
        (InstanceResources(1, 40_000), 160_000),
        (InstanceResources(1, 2048), 2048),
    ],
    ids=["vcpus", "memory quota", "host memory"],
)
async def test_quota_and_capacity(
    resources: InstanceResources, memory_mib: int, tmp_path: Path
) -> None:
    machine = seeded()
    machine.memory_mib = memory_mib
    machine.pools["acme", "web"] = PoolSpec("web", "acme", resources)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        before = dict(machine.resources)

        reply = await worker.run(START)

        assert reply.code is Code.EXHAUSTED
        assert machine.resources == before


async def test_starts_at_once_share_neither_uid_nor_quota(tmp_path: Path) -> None:
    machine = seeded()
    refs = [InstanceRef("acme", "web", f"n-{n}") for n in range(12)]
    for n, ref in enumerate(refs):
        machine.files[ref] = instance_file(ref, 10 + n)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        ids = [await worker.send(StartInstance("acme", "web", r.instance_id)) for r in refs]
        replies = [await worker.reply(command_id) for command_id in ids]

        codes = [reply.code for reply in replies]
        assert codes.count(Code.OK) == machine.tenants["acme"].quotas.max_running
        assert codes.count(Code.EXHAUSTED) == 4
        slots = [r.uid_slot for r in worker.journal.records.instances() if r.uid_slot is not None]
        assert len(set(slots)) == len(slots) == 8


async def test_a_uid_that_a_process_without_a_record_has_is_given_to_no_instance(
    tmp_path: Path,
) -> None:
    machine = seeded()
    base = VmmSettings().uid_base
    machine.foreign_uids |= {base, base + 2}
    refs = [InstanceRef("acme", "web", f"n-{n}") for n in range(2)]
    for n, ref in enumerate(refs):
        machine.files[ref] = instance_file(ref, 10 + n)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        for ref in refs:
            reply = await worker.run(StartInstance("acme", "web", ref.instance_id))
            assert reply.code is Code.OK, reply

        assert [r.uid_slot for r in worker.journal.records.instances()] == [1, 3]


async def test_stop_ends_a_start_that_waits_for_its_turn(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(UP)
        for n in range(worker.host.slots.boots.count):
            await worker.host.slots.boots.acquire(f"other-{n}")
        start = await worker.send(START)
        async with asyncio.timeout(10):
            while worker.journal.records.instance(REF) is None:
                await asyncio.sleep(0)
        await worker.send(STOP)

        assert (await worker.reply(start)).code is Code.SUPERSEDED


async def test_the_deadline_ends_a_wait_for_a_turn(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        for n in range(worker.host.slots.networks.count):
            await worker.host.slots.networks.acquire(f"other-{n}")

        reply = await worker.run(UP, deadline_ms=now_ms() + 100)

        assert reply.code is Code.EXPIRED


async def test_a_revision_goes_when_its_last_instance_starts_with_another(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        await worker.run(START)
        await worker.run(STOP)
        machine.revisions["acme", "web"] = "r2"

        await worker.run(START)

        assert [key for kind, key in machine.resources if kind == "artifact"] == ["acme/web/r2"]


async def test_an_old_revision_that_cannot_go_fails_no_start(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        await worker.run(START)
        await worker.run(STOP)
        machine.revisions["acme", "web"] = "r2"
        machine.fail["remove_artifact"] = HostFault("it stays")

        reply = await worker.run(START)

        assert (reply.code, reply.status) == (Code.OK, "running")
        assert reply.left_behind == ("artifact acme/web/r1: it stays",)


async def test_stop_ends_a_running_drain(tmp_path: Path) -> None:
    machine = seeded()
    machine.gates["drain_guest"] = Gate()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "SleepInstance")
        sleep = await worker.send(SLEEP)
        async with asyncio.timeout(10):
            while worker.record().status is not Status.DRAINING:
                await asyncio.sleep(0)
        stop = await worker.send(STOP)

        assert (await worker.reply(sleep)).code is Code.SUPERSEDED
        assert (await worker.reply(stop)).code is Code.OK
        assert worker.record().status is Status.STOPPED


async def test_a_guest_that_does_not_drain_sleeps_anyway(tmp_path: Path) -> None:
    machine = seeded()
    machine.drain_ack = False
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "SleepInstance")

        reply = await worker.run(SLEEP)

        assert reply.code is Code.OK
        assert reply.detail["drain"] == "refused"
        [info] = [v for (kind, _), v in machine.resources.items() if kind == "snapshot"]
        assert info.kept_config is not None


async def test_a_wake_is_new_in_pid_and_launch_and_keeps_its_place(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "SleepInstance")
        first = worker.record()
        machine.guests[first.jail_id].counter = 41
        await worker.run(SLEEP)

        reply = await worker.run(WAKE)

        second = worker.record()
        assert first.vmm is not None
        assert reply.detail["pid"] != first.vmm.pid
        assert second.launch == first.launch + 1
        assert machine.guests[second.jail_id].counter == 41
        assert (second.offset, second.net) == (first.offset, first.net)


async def test_launch_numbers_go_on_after_those_that_the_host_has_a_trace_of(
    tmp_path: Path,
) -> None:
    machine = seeded()
    machine.resources["jail", naming.jail_id(REF, 7)] = None
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)

        reply = await worker.run(START)

        assert (reply.code, reply.detail["launch"]) == (Code.OK, 8)


async def test_a_start_never_touches_a_live_vmm_that_the_journal_does_not_know(
    tmp_path: Path,
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "lost", machine) as worker:
        await prepare(worker, "StopInstance")
        jail_id = worker.record().jail_id
    before = dict(machine.resources)
    async with memory_worker(tmp_path / "new", machine) as worker:
        await worker.run(UP)

        reply = await worker.run(START)

        assert (reply.code, reply.detail["jail"]) == (Code.CONFLICT, jail_id)
        assert machine.resources == before
        assert machine.guests[jail_id].state == "Running"


async def failed_once(machine: FakeHost, effect: str) -> None:
    while effect not in machine.seen:
        await asyncio.sleep(0)
    await asyncio.sleep(0)


def status_of(worker: MemoryWorker) -> str | None:
    record = worker.journal.records.instance(REF)
    return None if record is None or record.status is Status.CREATED else str(record.status)


def shape(machine: FakeHost) -> dict[str, int]:
    """How many of each kind there are; names differ by launch number."""
    counts: dict[str, int] = {}
    for kind, _ in machine.resources:
        counts[kind] = counts.get(kind, 0) + 1
    for guest in machine.guests.values():
        counts[f"guest {guest.state}"] = counts.get(f"guest {guest.state}", 0) + 1
    return counts


GUEST_IP = "10.240.3.5"


@pytest.mark.parametrize(
    ("before", "command"),
    [
        ((UP, START), STOP),
        ((UP, START), DESTROY),
        ((UP, START), KEEP),
        ((UP, START, SLEEP), STOP),
        ((UP, START, SLEEP), DESTROY),
        ((UP,), START),
    ],
    ids=["stop", "destroy", "destroy, kept", "stop asleep", "destroy asleep", "start"],
)
async def test_a_released_address_has_no_flows(
    before: tuple[Request, ...], command: Request, tmp_path: Path
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in before:
            assert (await worker.run(request)).code is Code.OK
        machine.flows |= {GUEST_IP, "10.240.3.6"}

        assert (await worker.run(command)).code is Code.OK

        assert machine.flows == {"10.240.3.6"}, "the address's own, and no other's"


async def test_a_sleeping_guest_finds_its_flows_at_its_wake(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "SleepInstance")
        machine.flows.add(GUEST_IP)

        assert (await worker.run(SLEEP)).code is Code.OK
        assert (await worker.run(WAKE)).code is Code.OK

        assert machine.flows == {GUEST_IP}


async def test_a_guest_that_may_have_booted_keeps_its_flows(tmp_path: Path) -> None:
    machine = seeded()
    reached = asyncio.Event()

    async def stop_there(moment: str) -> None:
        if moment == "after:start_vm":
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", machine, failpoint=stop_there) as worker:
        await prepare(worker, "StartInstance")
        command_id = await worker.send(START)
        await asyncio.wait_for(reached.wait(), 10)
        await worker.kill()
    machine.flows.add(GUEST_IP)

    async with memory_worker(tmp_path / "j", machine) as worker:
        assert (await worker.reply(command_id)).code is Code.OK

    assert machine.flows == {GUEST_IP}


@pytest.mark.parametrize("field", ["mem_mib", "data_disk_mib"])
async def test_what_the_vmm_could_not_write_is_refused_at_the_start(
    field: str, tmp_path: Path
) -> None:
    machine = seeded()
    pool = machine.pools["acme", "web"]
    sizes = replace(pool.instance_resources, **{field: VmmSettings().max_file_mib + 1})
    machine.pools["acme", "web"] = replace(pool, instance_resources=sizes)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "StartInstance")

        reply = await worker.run(START)

        assert reply.code is Code.INVALID
        assert reply.detail["path"] == f"pool.json: $.instance_resources.{field}"


def second_tenant(machine: FakeHost) -> tuple[SetupNetwork, StartInstance]:
    """Tenant beta beside acme, with an instance; the commands that start it."""
    net = TenantNet(4, "10.240.4.0/24", "10.240.4.1", "br-tenant-4")
    ref = InstanceRef("beta", "web", "i-1")
    machine.tenants["beta"] = TenantConfig("beta", machine.tenants["acme"].quotas, net)
    machine.pools["beta", "web"] = PoolSpec("web", "beta", InstanceResources(1, 128, 16))
    machine.revisions["beta", "web"] = "r1"
    machine.files[ref] = instance_file(ref, 5, 4)
    return SetupNetwork("beta", net), StartInstance("beta", "web", "i-1")


async def importing(worker: MemoryWorker, count: int) -> list[str]:
    """As many Starts of acme, whose imports never end."""
    worker.machine.stuck_imports.add("acme")
    refs = [InstanceRef("acme", "web", f"i-{n}") for n in range(1, count + 1)]
    for n, ref in enumerate(refs):
        worker.machine.files[ref] = instance_file(ref, 5 + n)
    ids = [await worker.send(StartInstance("acme", "web", r.instance_id)) for r in refs]
    async with asyncio.timeout(10):
        while len(worker.journal.records.instances()) < count:
            await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    return ids


async def outcome(worker: MemoryWorker, command_id: str) -> Reply:
    """The reply of one command while those of other lanes do not end."""
    async with asyncio.timeout(10):
        while True:
            found = await worker.journal.commands.result(command_id)
            if found is not None and found.reply is not None:
                return codec.decode_reply(found.reply)
            await asyncio.sleep(0)


async def test_imports_of_one_tenant_hold_up_no_other_tenant(tmp_path: Path) -> None:
    machine = seeded()
    up, start = second_tenant(machine)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        await worker.run(up)
        await importing(worker, 8)

        started = await outcome(worker, await worker.send(start))

        assert started.code is Code.OK, started
        assert worker.host.slots.boots.held("acme") == 0


@pytest.mark.parametrize("command", [STOP, DESTROY, KEEP], ids=["stop", "wipe", "keep"])
async def test_stop_and_destroy_end_an_import(tmp_path: Path, command: Request) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(UP)
        ids = await importing(worker, 8)

        ended = await outcome(worker, await worker.send(command))

        assert ended.code is Code.OK, ended
        assert (await outcome(worker, ids[0])).code is Code.SUPERSEDED


async def test_the_deadline_ends_an_import(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await worker.run(UP)
        worker.machine.stuck_imports.add("acme")

        reply = await worker.run(START, deadline_ms=now_ms() + 100)

        assert reply.code is Code.EXPIRED
        assert worker.host.slots.imports.held("acme") == 0


async def test_a_hidden_disk_is_a_failed_wipe_until_it_is_back(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "DestroyInstance")
        disk = machine.resources.pop(("data_disk", str(REF)))

        hidden = await worker.run(DESTROY)
        assert (hidden.code, hidden.status, hidden.changed) == (Code.INVALID, "running", False)

        machine.resources["data_disk", str(REF)] = disk
        back = await worker.run(DESTROY)
        assert (back.code, back.detail["volumes"]) == (Code.OK, "wiped")


async def test_a_kept_disk_that_is_hidden_is_not_reported_as_wiped(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "DestroyInstance")
        assert (await worker.run(KEEP)).code is Code.OK
        disk = machine.resources.pop(("data_disk", str(REF)))

        hidden = await worker.run(DESTROY)
        assert hidden.code is Code.HOST_FAULT

        machine.resources["data_disk", str(REF)] = disk
        assert (await worker.run(DESTROY)).detail["volumes"] == "wiped"
