"""When orphans are removed, how many, and what a removal leaves in the journal."""

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from handlers.claims.orphan import Orphan
from handlers.clock import now_ms
from handlers.errors import HostFault
from schemas import codec, naming
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import Event
from schemas.requests import InstanceRef, Request, SetupNetwork
from schemas.settings import SweepSettings
from tests.constants import DESTROY, NET, REF, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, Gate, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import FakeInventory, Reconciled, reconciled
from worker.journal.writer import JournalFault
from worker.reconcile.sweep import HOUR_MS, SIGHTINGS_S

UP = SetupNetwork("acme", NET)
GRACE_S = SweepSettings().grace_s
JAILS = tuple(f"0123456789ab-{n}" for n in range(1, 9))


async def events(worker: MemoryWorker, kind: str) -> list[Event]:
    rows = await worker.journal.outbox.pending("event", 1000)
    found = [codec.decode_event(row.payload) for row in rows]
    return [event for event in found if event.kind == kind]


async def passes(made: Reconciled, seconds: float, every_s: float = 30.0) -> None:
    """The reconciler's passes of that much time."""
    until = made.now_s + seconds
    while made.now_s < until:
        made.now_s += every_s
        await made.sweep.once()


async def test_one_is_removed_after_two_sightings_and_the_grace_period(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:1])

        await made.sweep.once()
        await passes(made, SIGHTINGS_S + GRACE_S - 30)
        assert made.removal.removed == []
        await passes(made, 30)

        assert made.removal.removed == [Orphan("jails", JAILS[0])]
        (event,) = await events(worker, "removed")
        assert event.detail == {
            "kind": "jails",
            "name": JAILS[0],
            "by": "sweep",
            "result": "removed",
        }
        counted = {"kind": "jails", "result": "removed"}
        value = made.metrics.registry.get_sample_value("hostd_orphans_swept_total", counted)
        assert value == 1


async def test_one_that_was_away_meanwhile_is_seen_as_for_the_first_time(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:1])
        await made.sweep.once()
        await passes(made, GRACE_S)
        made.inventory = FakeInventory()
        await passes(made, 30)
        made.inventory = FakeInventory(jails=JAILS[:1])

        await passes(made, SIGHTINGS_S + GRACE_S)

        assert made.removal.removed == []


async def test_in_an_hour_no_more_than_the_budget_and_then_an_alert(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS)
        stopped = "hostd_sweep_stopped"
        await made.sweep.once()

        await passes(made, SIGHTINGS_S + GRACE_S + 300)

        assert len(made.removal.removed) == 5
        assert made.metrics.registry.get_sample_value(stopped) == 1
        (event,) = await events(worker, "orphans")
        assert event.detail == {"per_hour": 5, "left": {"jails": 3}}


async def test_the_budget_outlives_the_worker(tmp_path: Path) -> None:
    machine = seeded()
    for removed in (5, 0):
        async with memory_worker(tmp_path / "j", machine) as worker:
            made = reconciled(worker)
            made.inventory = FakeInventory(jails=JAILS)
            await made.sweep.once()

            await passes(made, SIGHTINGS_S + GRACE_S)

            assert len(made.removal.removed) == removed


async def test_the_budget_is_free_again_an_hour_later(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS)
        await made.sweep.once()
        await passes(made, SIGHTINGS_S + GRACE_S)
        assert len(made.removal.removed) == 5
        an_hour_later = now_ms() + HOUR_MS + 1000
        worker.journal.store.now_ms = lambda: an_hour_later

        made.inventory = FakeInventory(jails=JAILS[5:])
        await passes(made, 30)

        assert len(made.removal.removed) == 8
        assert made.metrics.registry.get_sample_value("hostd_sweep_stopped") == 0


async def test_with_mode_report_none_is_removed(tmp_path: Path) -> None:
    settings = SweepSettings(mode="report")
    async with memory_worker(tmp_path / "j", seeded(), sweep=settings) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:1])
        await made.sweep.once()

        await passes(made, SIGHTINGS_S + GRACE_S + 300)

        assert made.removal.removed == []
        orphans = made.metrics.registry.get_sample_value("hostd_orphans", {"kind": "jails"})
        assert orphans == 1
        report = await made.sweep.now(dry_run=False)
        assert [each.state for each in report] == ["removed"]


async def test_an_operators_sweep_needs_two_sightings_and_nothing_else(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS)

        first = await made.sweep.now(dry_run=False)
        made.now_s += SIGHTINGS_S
        asked = await made.sweep.now(dry_run=True)
        assert made.removal.removed == []
        done = await made.sweep.now(dry_run=False)

        assert {each.state for each in first} == {"waiting"}
        assert {each.state for each in asked} == {"due"}
        assert [each.state for each in done] == ["removed"] * len(JAILS)
        assert {event.detail["by"] for event in await events(worker, "removed")} == {"operator"}
        # It is not the automatic sweep's budget.
        assert await worker.journal.audit.spent_within(HOUR_MS) == 0


async def test_what_is_in_use_stays_and_does_not_cost_the_budget(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:6])
        made.removal.used = {Orphan("jails", JAILS[0])}
        await made.sweep.once()

        await passes(made, SIGHTINGS_S + GRACE_S)

        assert [each.name for each in made.removal.removed] == list(JAILS[1:6])
        assert len(await events(worker, "removed")) == 5


async def test_a_removal_that_fails_is_reported_and_costs_the_budget(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:1])
        made.removal.broken = {Orphan("jails", JAILS[0])}
        await made.sweep.once()

        await passes(made, SIGHTINGS_S + GRACE_S + 300)

        (event,) = await events(worker, "removed")
        assert (event.detail["result"], event.reason) == ("failed", "the kernel refuses")
        assert await worker.journal.audit.spent_within(HOUR_MS) == 1


@pytest.mark.parametrize(
    "error", [KeyError("a bug"), DecodeError("$.t", "a foreign name"), OSError(5)]
)
async def test_whatever_fails_at_one_orphan_the_others_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:2])
        remove = made.removal.remove

        async def fail_one(orphan: Orphan) -> None:
            if orphan.name == JAILS[0]:
                raise error
            await remove(orphan)

        monkeypatch.setattr(made.removal, "remove", fail_one)
        await made.sweep.once()
        await passes(made, SIGHTINGS_S + GRACE_S)

        results = [event.detail["result"] for event in await events(worker, "removed")]
        assert (made.removal.removed, results) == (
            [Orphan("jails", JAILS[1])],
            ["failed", "removed"],
        )
        assert await worker.journal.audit.close_cut_off() == 0


@pytest.mark.parametrize("error", [HostFault("damaged"), KeyError("a bug")])
async def test_a_snapshot_that_cannot_be_read_keeps_the_revisions_of_its_pool_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(
            jails=JAILS[:1],
            snapshots=["acme/web/i-7/1"],
            artifacts=["acme/other/r1", "acme/web/r1", "acme/web/r2"],
        )

        async def fail(ref: InstanceRef) -> None:
            raise error

        monkeypatch.setattr(worker.host.snapshots, "read", fail)
        await made.sweep.once()
        await passes(made, SIGHTINGS_S + GRACE_S)

        assert made.removal.removed == [
            Orphan("jails", JAILS[0]),
            Orphan("artifacts", "acme/other/r1"),
        ]


async def test_a_jail_that_cannot_be_read_keeps_all_revisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(
            jails=JAILS[:1], taps=["tn4i9"], artifacts=["acme/web/r1", "umbra/web/r1"]
        )

        async def fail(jail_id: str) -> None:
            raise HostFault("damaged")

        monkeypatch.setattr(worker.host.jails, "metadata", fail)
        await made.sweep.once()
        await passes(made, SIGHTINGS_S + GRACE_S)

        assert made.removal.removed == [Orphan("taps", "tn4i9")]


async def test_names_that_agentd_makes_use_up_no_other_share_of_the_budget(tmp_path: Path) -> None:
    """Not in one hour, nor one tenant's that of the others over the hours."""
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        base = f"{worker.host.settings.paths.data}/tenants"
        many = [f"{base}/acme/.{n:03}.hostd" for n in range(100)]
        few = [f"{base}/{tenant}/.x.hostd" for tenant in ("b", "c", "d", "e", "f", "g")]
        made.inventory = FakeInventory(jails=JAILS[:2], temp=[*many, *few])
        await passes(made, SIGHTINGS_S + GRACE_S + 60)
        first = [each.name for each in made.removal.removed]
        left = [each for each in (*JAILS[:2], *many, *few) if each not in first]
        an_hour_later = now_ms() + HOUR_MS + 1000
        worker.journal.store.now_ms = lambda: an_hour_later
        made.inventory = FakeInventory(
            jails=[each for each in left if each in JAILS],
            temp=[each for each in left if each not in JAILS],
        )
        await passes(made, 30)
        second = [each.name for each in made.removal.removed][len(first) :]

    assert first == [JAILS[0], many[0], *few[:3]]
    assert second == [JAILS[1], *few[3:], many[1]]


async def test_a_result_that_cannot_be_committed_is_found_out_by_the_next_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:1])

        async def fail(*_: object) -> None:
            raise JournalFault("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(worker.journal.audit, "end", fail)
            with pytest.raises(JournalFault):
                await passes(made, SIGHTINGS_S + GRACE_S + 60)
        assert made.removal.removed == [Orphan("jails", JAILS[0])]
        made.inventory = FakeInventory()
        await made.sweep.once()

        (row,) = await worker.journal.audit.newest()
        (event,) = await events(worker, "removed")
    assert (row.result, event.detail["result"]) == ("cut off", "cut off")
    assert (row.reason or "").endswith("; it is gone")


async def test_a_row_whose_commit_failed_and_is_there_is_ended_by_the_next_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:1])
        begin = worker.journal.audit.begin

        async def fail(*given: Any) -> int:
            await begin(*given)
            raise JournalFault("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(worker.journal.audit, "begin", fail)
            with pytest.raises(JournalFault):
                await passes(made, SIGHTINGS_S + GRACE_S + 60)
        made.inventory = FakeInventory()
        await made.sweep.once()

        (row,) = await worker.journal.audit.newest()
    assert row.result == "cut off"


async def test_a_removal_that_a_kill_cut_off_is_reported_by_the_next_worker(
    tmp_path: Path,
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.journal.audit.begin(Orphan("jails", JAILS[0]), "sweep")
    async with memory_worker(tmp_path / "j", machine) as worker:
        await reconciled(worker).sweep.once()

        (event,) = await events(worker, "removed")
        assert (event.detail["name"], event.detail["result"]) == (JAILS[0], "cut off")
        assert await worker.journal.audit.spent_within(HOUR_MS) == 1


async def test_what_a_released_or_lost_vmm_uses_is_never_removed(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "lost", machine) as worker:
        for request in (UP, START):
            assert (await worker.run(request)).code is Code.OK
    before = dict(machine.resources)
    async with memory_worker(tmp_path / "new", machine) as worker:
        made = reconciled(worker)
        await made.reconciler.once()

        await passes(made, 2 * (SIGHTINGS_S + GRACE_S))
        report = await made.sweep.now(dry_run=False)

        assert machine.resources == before
        assert {each.state for each in report} == {"kept"}
        jail = next(key for kind, key in machine.resources if kind == "jail")
        machine.kill(jail)
        await made.reconciler.once()
        await passes(made, SIGHTINGS_S + GRACE_S)
        await made.sweep.now(dry_run=False)  # the jail, with which the last reference goes
        await passes(made, SIGHTINGS_S + 30)
        await made.sweep.now(dry_run=False)
        left = {kind for kind, _ in machine.resources}
        assert left == {"data_disk"}


async def test_a_sleeping_instance_of_a_lost_journal_loses_nothing(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "lost", machine) as worker:
        for request in (UP, START, SLEEP):
            assert (await worker.run(request)).code is Code.OK
    async with memory_worker(tmp_path / "new", machine) as worker:
        made = reconciled(worker)
        await made.sweep.once()

        await passes(made, 2 * (SIGHTINGS_S + GRACE_S))

        assert {orphan.kind for orphan in made.removal.removed} == {"bridges", "nft"}
        assert (await worker.run(UP)).code is Code.OK
        assert (await worker.run(WAKE)).code is Code.OK


async def test_an_orphan_of_an_instance_whose_lane_is_busy_is_kept(tmp_path: Path) -> None:
    machine = seeded()
    gate = machine.gates["drain_guest"] = Gate()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START):
            assert (await worker.run(request)).code is Code.OK
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=(naming.jail_id(REF, 9),))
        await made.sweep.once()
        made.now_s += SIGHTINGS_S
        sleeping = await worker.send(SLEEP)
        await gate.reached.wait()

        (kept,) = await made.sweep.now(dry_run=False)
        gate.opened.set()
        assert (await worker.reply(sleeping)).code is Code.OK
        (removed,) = await made.sweep.now(dry_run=False)

        assert (kept.state, kept.reason) == (
            "kept",
            "a command of its instance is unfinished",
        )
        assert removed.state == "removed"


class SweepingFailpoint:
    """At each point of a command, everything that is an orphan then is removed."""

    def __init__(self) -> None:
        self.made: Reconciled | None = None
        self.points: list[str] = []

    async def __call__(self, moment: str) -> None:
        self.points.append(moment)
        if self.made is not None:
            await self.made.sweep.now(dry_run=False)
            self.made.now_s += SIGHTINGS_S
            await self.made.sweep.now(dry_run=False)


LIVES: Sequence[Sequence[Request]] = (
    (UP, START, STOP),
    (UP, START, SLEEP, WAKE, DESTROY),
)


@pytest.mark.parametrize("life", LIVES, ids=["start-stop", "sleep-wake-destroy"])
async def test_nothing_that_a_command_is_making_is_an_orphan_at_any_of_its_steps(
    tmp_path: Path, life: Sequence[Request]
) -> None:
    machine: FakeHost = seeded()
    undisturbed: FakeHost = seeded()
    async with memory_worker(tmp_path / "other", undisturbed) as worker:
        for request in life:
            assert (await worker.run(request)).code is Code.OK
    failpoint = SweepingFailpoint()
    async with memory_worker(tmp_path / "j", machine, failpoint=failpoint) as worker:
        failpoint.made = reconciled(worker)

        for request in life:
            assert (await worker.run(request)).code is Code.OK

        assert len(failpoint.points) > 20
        assert failpoint.made.removal.removed == []
        assert machine.resources.keys() == undisturbed.resources.keys()


@pytest.mark.parametrize("step", ["cgroup", "pin", "tap", "jail", "vmm", "wait_agent"])
async def test_nothing_that_an_undo_has_still_to_remove_is_an_orphan(
    tmp_path: Path, step: str
) -> None:
    machine: FakeHost = seeded()
    failpoint = SweepingFailpoint()
    async with memory_worker(tmp_path / "j", machine, failpoint=failpoint) as worker:
        assert (await worker.run(UP)).code is Code.OK
        failpoint.made = reconciled(worker)
        machine.fail = {step: HostFault("injected"), "remove_tap": HostFault("stuck")}

        await worker.run(START)
        await failpoint.made.sweep.now(dry_run=False)
        failpoint.made.now_s += SIGHTINGS_S
        await failpoint.made.sweep.now(dry_run=False)

        taps = [orphan for orphan in failpoint.made.removal.removed if orphan.kind == "taps"]
        assert taps == []


async def test_while_a_call_hangs_in_the_kernel_nothing_is_removed(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:1])
        await made.sweep.once()
        made.calls_hang = True
        await passes(made, SIGHTINGS_S + GRACE_S)
        assert made.removal.removed == []

        made.calls_hang = False
        await passes(made, SIGHTINGS_S + GRACE_S)
        assert made.removal.removed == [Orphan("jails", JAILS[0])]


async def test_while_a_record_cannot_be_read_there_are_no_orphans(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START):
            assert (await worker.run(request)).code is Code.OK
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as file, file:
        file.execute("UPDATE instance SET record = '{}'")
    async with memory_worker(tmp_path / "j", machine) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=JAILS[:1])
        await made.sweep.once()
        made.now_s += SIGHTINGS_S

        assert await made.sweep.now(dry_run=False) == []
        assert made.removal.removed == []
