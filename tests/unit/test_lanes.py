"""Which command may run: order in a lane, no order between lanes, superseding."""

import asyncio
from pathlib import Path

import pytest

from handlers.steps import Done, Steps
from schemas.codes import Code
from schemas.requests import DestroyInstance, Request, SleepInstance, StopInstance, WakeInstance
from schemas.settings import LimitSettings
from schemas.subjects import Lane
from tests.fakes.shell_worker import REF, FakeHandlers, command, shell_worker, start, stop

DESTROY = DestroyInstance("acme", "web", "a1", wipe_volumes=False)
SLEEP = SleepInstance("acme", "web", "a1", force=False)
WAKE = WakeInstance("acme", "web", "a1")


async def test_a_lane_runs_in_order_and_lanes_run_at_once(tmp_path: Path) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start(), "c1")
        worker.send(start(), "c2")
        worker.send(start(), "c3")
        await machine.at_gate.wait()
        machine.at_gate.clear()
        worker.send(start("a2"), "d1")
        await machine.at_gate.wait()

        assert [run[0] for run in machine.runs] == ["c1", "d1"]
        assert worker.lanes.counts() == {"busy": 2, "waiting": 1}
        gate.set()
        await worker.reply("c3")
        await worker.reply("d1")
        await worker.lanes.idle()
        assert [run[0] for run in machine.runs] == ["c1", "d1", "c2", "c3"]
        assert worker.lanes.counts() == {"busy": 0, "waiting": 0}


async def test_500_commands_in_one_lane_do_not_delay_another(tmp_path: Path) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        for n in range(500):
            worker.send(start(), f"c{n}")
        await worker.bus.until(replies=400)
        worker.send(stop("a2"), "other")
        assert (await worker.reply("other")).code is Code.OK

        refused = [reply for reply in worker.replies() if reply.id != "other"]
        assert {(r.code, r.retryable, r.detail["act"]) for r in refused} == {
            (Code.EXHAUSTED, True, "scheduler")
        }
        assert len(refused) == 400
        gate.set()
        await worker.bus.until(replies=501)
        await worker.bus.until_acked()
        codes = [reply.code for reply in worker.replies()]
        assert (codes.count(Code.OK), codes.count(Code.EXHAUSTED)) == (101, 400)
        assert len({reply.id for reply in worker.replies()}) == 501


async def test_an_exhausted_command_stays_exhausted_for_its_id(tmp_path: Path) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    limits = LimitSettings(lane_depth=1)
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits) as worker:
        worker.send(start(), "c1")
        await machine.at_gate.wait()
        worker.send(start(), "c2")
        await worker.reply("c2")
        gate.set()
        await worker.reply("c1")
        worker.send(start(), "c2", reply_to="_INBOX.2")
        await worker.bus.until(sent=1)

        assert len(worker.bus.replies()) == 2
        assert worker.bus.dead() == []


@pytest.mark.parametrize("winner", [stop(), DESTROY])
@pytest.mark.parametrize("loser", [start(), WAKE, SLEEP])
async def test_stop_and_destroy_supersede_running_and_waiting_commands(
    tmp_path: Path, winner: StopInstance, loser: Request
) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(loser, "runs")
        await machine.at_gate.wait()
        worker.send(loser, "waits")
        worker.send(winner, "wins")
        replies = {name: await worker.reply(name) for name in ("runs", "waits", "wins")}

        assert replies["runs"].code is Code.SUPERSEDED
        assert replies["waits"].code is Code.SUPERSEDED
        assert replies["waits"].attempts == 0
        assert replies["runs"].steps[-1].outcome == "undone"
        assert replies["wins"].code is Code.OK
        assert machine.things.there == set()
        assert not worker.journal.steps.leftovers()


async def test_a_superseded_waiting_command_is_answered_before_the_lane_is_free(
    tmp_path: Path,
) -> None:
    release = asyncio.Event()

    async def stubborn(request: Request, steps: Steps) -> Done:
        if steps.command_id == "runs":
            await release.wait()
        return Done(changed=True, status=None, detail={})

    async with shell_worker(tmp_path / "j", machine=FakeHandlers(behave=stubborn)) as worker:
        worker.send(stop(), "runs")
        worker.send(start(), "waits")
        worker.send(stop(), "wins")
        reply = await worker.reply("waits")

        assert (reply.code, reply.detail["by"]) == (Code.SUPERSEDED, "wins")
        assert [r.id for r in worker.replies()] == ["waits"]
        release.set()
        assert (await worker.reply("wins")).code is Code.OK


async def test_a_stop_does_not_supersede_commands_of_another_instance(tmp_path: Path) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start(), "c1")
        await machine.at_gate.wait()
        worker.send(stop("a2"), "other")
        await worker.reply("other")
        gate.set()

        assert (await worker.reply("c1")).code is Code.OK


async def test_a_command_past_its_point_of_no_return_is_not_superseded(tmp_path: Path) -> None:
    reached, release = asyncio.Event(), asyncio.Event()

    async def waking(request: Request, steps: Steps) -> Done | None:
        if not isinstance(request, WakeInstance):
            return None
        await steps.reach("consumed", nothing)
        reached.set()
        await steps.interruptible("agent", release.wait)
        return Done(changed=True, status="running", detail={})

    async with shell_worker(tmp_path / "j", machine=FakeHandlers(behave=waking)) as worker:
        worker.send(WAKE, "wake")
        await reached.wait()
        worker.send(stop(), "stop")
        await worker.bus.until_acked()
        release.set()

        assert (await worker.reply("wake")).code is Code.OK
        assert (await worker.reply("stop")).code is Code.OK


@pytest.mark.parametrize("order", ["stop first", "destroy waits"])
async def test_a_destroy_cuts_the_grace_period_of_a_stop(tmp_path: Path, order: str) -> None:
    reached = asyncio.Event()

    async def never() -> bool:
        reached.set()
        return await asyncio.Event().wait()

    async def stopping(request: Request, steps: Steps) -> Done | None:
        if not isinstance(request, StopInstance):
            return None
        steps.finalize()
        exited = await steps.control.unhurried(never)
        return Done(changed=True, status="stopped", detail={"exited": exited})

    async with shell_worker(tmp_path / "j", machine=FakeHandlers(behave=stopping)) as worker:
        worker.send(stop(), "stop")
        if order == "stop first":
            await reached.wait()
        worker.send(DESTROY, "destroy")

        assert (await worker.reply("stop")).detail == {"exited": None}
        assert (await worker.reply("destroy")).code is Code.OK


async def test_after_a_restart_an_earlier_run_is_undone_before_the_superseded_reply(
    tmp_path: Path,
) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine, send=False) as worker:
        worker.send(start(), "began")
        await machine.at_gate.wait()
        worker.send(start(), "waits")
        await worker.bus.until_acked()
        bus = worker.bus
    assert machine.things.there == {str(REF)}

    async with shell_worker(tmp_path / "j", bus, machine, consume=False, run=False) as worker:
        # the Stop comes while recovery still holds the lanes
        decision = await worker.journal.commands.take_in(
            command(stop(), "c9"),
            lane=Lane.instance(REF),
            subject="s",
            stream_seq=9,
            received_at_ms=1,
        )
        assert decision.row is not None
        worker.lanes.put(decision.row)
        assert (await worker.reply("waits")).attempts == 0
        worker.lanes.start()
        codes = [(await worker.reply(name)).code for name in ("began", "waits", "c9")]

        assert codes == [Code.SUPERSEDED, Code.SUPERSEDED, Code.OK]
        assert machine.things.there == set()
        assert not worker.journal.steps.leftovers()


async def nothing() -> None:
    """The commit of a point of no return in these tests."""
