"""Each budget of the journal has a share per tenant, and what somebody else makes grow a bound."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from schemas.codes import Code
from schemas.requests import Error, InstanceRef, SetupNetwork, StartInstance, StopInstance
from schemas.settings import LimitSettings
from schemas.subjects import Lane
from tests.fakes.shell_worker import FakeHandlers, command, shell_worker, start
from tests.unit.journal.journals import NET, accept, finish, ok, opened
from worker.journal.admission import JOINERS_MAX, RESERVED, TENANT_PARTS, Limits, Verdict


def of(tenant: str, instance: str = "a") -> StartInstance:
    return StartInstance(tenant, "web", instance)


@pytest.mark.parametrize("redelivered", [False, True])  # decided from memory, or from the file
async def test_a_tenant_that_fills_the_host_leaves_room_for_every_other(
    tmp_path: Path, redelivered: bool
) -> None:
    async def verdict(request: StartInstance | StopInstance | SetupNetwork, name: str) -> Verdict:
        return (await accept(journal, command(request, name), redelivered=redelivered)).verdict

    limits = {"lane_depth": 100, "tenant_depth": 20, "host_depth": 2 * TENANT_PARTS}
    async with opened(tmp_path, **limits) as journal:
        flood = [await verdict(of("acme", f"i{n}"), f"f{n}") for n in range(21)]
        lane = await verdict(SetupNetwork("acme", NET), "net")
        stops = [
            await verdict(StopInstance("acme", "web", f"i{n}"), f"s{n}")
            for n in range(RESERVED + 1)
        ]
        other = await verdict(of("acme-2"), "o1")
        await finish(journal, ok("f0"))
        for n in range(RESERVED):
            await finish(journal, ok(f"s{n}"))
        again = await verdict(of("acme"), "again")

    assert flood == [Verdict.NEW] * 20 + [Verdict.TENANT_FULL]
    assert lane is Verdict.TENANT_FULL
    assert stops == [Verdict.NEW] * RESERVED + [Verdict.TENANT_FULL]
    assert (other, again) == (Verdict.NEW, Verdict.NEW)


def test_on_a_full_host_each_tenant_has_a_few_places_up_to_twice_the_limit() -> None:
    limits = Limits(lane_depth=100, tenant_depth=1000, host_depth=5000)
    own = 5000 // TENANT_PARTS

    assert limits.full(0, own - 1, 5000, reserved=0) is None
    assert limits.full(0, own, 5000, reserved=0) is Verdict.HOST_FULL
    assert limits.full(0, 0, 9999, reserved=0) is None
    assert limits.full(0, 0, 10_000, reserved=0) is Verdict.HOST_FULL
    assert limits.full(0, 1000, 1000, reserved=0) is Verdict.TENANT_FULL


async def test_the_copies_of_a_command_that_wait_for_its_reply_have_a_limit(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:
        await accept(journal, command(start()))
        copies = [
            (await accept(journal, command(start(), reply_to=f"_INBOX.{n}"), n)).verdict
            for n in range(2, JOINERS_MAX + 3)
        ]
        again = await accept(journal, command(start(), reply_to="_INBOX.2"), 2)
        await finish(journal, ok())
        direct = await journal.outbox.pending("direct", 100)

    assert copies == [Verdict.JOINED] * JOINERS_MAX + [Verdict.JOINERS_FULL]
    assert again.verdict is Verdict.JOINED
    assert len(direct) == JOINERS_MAX


async def test_a_tenant_beyond_its_limit_is_told_which_and_who_must_act(tmp_path: Path) -> None:

    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    limits = LimitSettings(tenant_depth=1)
    async with shell_worker(tmp_path / "j", machine=machine, limits=limits) as worker:
        worker.send(start("a1"), "c1")
        await machine.at_gate.wait()
        worker.send(start("a2"), "c2")
        refused = await worker.reply("c2")
        gate.set()

        assert refused.code is Code.EXHAUSTED
        assert isinstance(refused.response, Error)
        assert "tenant acme has 1 unfinished" in refused.response.message
        assert refused.detail["act"] == "scheduler"


def test_the_lanes_of_a_tenant_are_its_own_only() -> None:
    lanes = [Lane.network("acme"), Lane.instance(InstanceRef("acme", "web", "a"))]

    assert {lane.tenant_id for lane in lanes} == {"acme"}
    assert Lane.host().tenant_id is None


async def test_refused_messages_and_finished_commands_have_a_bound_at_the_largest_tenants_cost(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:
        for n in range(12):
            await accept(journal, command(of("acme", f"i{n}"), f"a{n}"))
            journal.commands.begin_attempt(f"a{n}")
            await finish(journal, ok(f"a{n}", finished_at_ms=journal.store.now_ms()))
        for n in range(3):
            await accept(journal, command(of("umbra"), f"u{n}"))
            journal.commands.begin_attempt(f"u{n}")
            await finish(journal, ok(f"u{n}", finished_at_ms=journal.store.now_ms()))
        for n in range(4):
            await accept(journal, command(of("never"), f"r{n}"))
            await finish(journal, ok(f"r{n}", attempts=0, finished_at_ms=journal.store.now_ms()))

        while await journal.commands.prune(finished_max=10, refused_max=2, limit=3):
            pass

        known = [
            name
            for name in [*(f"a{n}" for n in range(12)), "u0", "u1", "u2", "r0", "r1", "r2", "r3"]
            if await journal.commands.result(name) is not None
        ]

    assert known == ["a7", "a8", "a9", "a10", "a11", "u0", "u1", "u2", "r2", "r3"]


DAY_MS = 24 * 3_600_000


async def test_a_clock_that_jumps_ahead_forgets_no_id_early(tmp_path: Path) -> None:
    wall_ms, monotonic_s = 1000 * DAY_MS, 0.0

    def clocks() -> dict[str, Any]:
        return {"clock_ms": lambda: wall_ms, "monotonic_s": lambda: monotonic_s}

    async with opened(tmp_path, **clocks()) as journal:
        await accept(journal, command(start()))
        await finish(journal, ok(finished_at_ms=wall_ms))
        assert await journal.commands.prune() == 0
    wall_ms += 3 * DAY_MS  # while no worker runs
    async with opened(tmp_path, **clocks()) as journal:
        assert await journal.commands.prune() == 0
        wall_ms += 3 * DAY_MS  # while one runs
        monotonic_s += 11 * 3600
        assert await journal.commands.prune() == 0
        assert (await accept(journal, command(start()), 2)).verdict is Verdict.REPLAY
        monotonic_s += 3600
        assert await journal.commands.prune() == 1
