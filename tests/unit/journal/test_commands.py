"""Commands in the journal: identity, limits, attempts, outcomes, retention."""

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.mechanism import StepRow
from schemas import codec
from schemas.requests import Request
from schemas.subjects import Lane
from tests.fakes.shell_worker import REF, SUBJECTS, command, start, stop
from tests.unit.journal.journals import accept, events, finish, intent, ok, opened
from worker.journal.admission import RESERVED, Verdict


async def test_identity_is_the_id_and_the_request_not_the_envelope(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        first = await accept(journal, command(start(), reply_to="_INBOX.1"))
        joins = await accept(journal, command(start(), reply_to="_INBOX.2", issuer="x"), 2)
        again = await accept(journal, command(start(), reply_to="_INBOX.1"), 1, redelivered=True)
        clash = await accept(journal, command(stop(), reply_to="_INBOX.3"), 3)
        await finish(journal, ok())
        replay = await accept(journal, command(start(), deadline_ms=1), 4)
        late = await accept(journal, command(start(), reply_to="_INBOX.1"), 1, redelivered=True)
        direct = await journal.outbox.pending("direct", 10)
        (kept,) = await journal.outbox.pending("reply", 10)

    assert [a.verdict for a in (first, joins, again, clash, replay, late)] == [
        Verdict.NEW, Verdict.JOINED, Verdict.JOINED,
        Verdict.CONFLICT, Verdict.REPLAY, Verdict.JOINED,
    ]  # fmt: skip
    assert kept.payload == codec.encode_reply(ok())
    assert (kept.msg_id, kept.subject) == ("c1", "hostd.v1.test.h1.reply.instance.acme.web.a1")
    replayed = codec.encode_reply(replace(ok(), replayed=True))
    assert replay.reply == replayed
    assert [(r.subject, r.payload) for r in direct] == [
        ("_INBOX.1", kept.payload),
        ("_INBOX.2", replayed),
    ]


@pytest.mark.parametrize("redelivered", [False, True])  # decided from memory, or from the file
async def test_a_lane_and_the_host_have_a_limit_of_unfinished_commands(
    tmp_path: Path, redelivered: bool
) -> None:
    async def verdict(instance: str, n: int) -> Verdict:
        given = command(start(instance), f"{instance}{n}")
        return (await accept(journal, given, redelivered=redelivered)).verdict

    async with opened(tmp_path, lane_depth=3, host_depth=5) as journal:
        verdicts = [await verdict("a", n) for n in range(4)]
        verdicts += [await verdict("b", n) for n in range(3)]
        known = await accept(journal, command(start("a"), "a0"), 2)
        await finish(journal, ok("a0"))
        room = await accept(journal, command(start("a"), "a9"))

    new = Verdict.NEW
    assert verdicts == [new, new, new, Verdict.LANE_FULL, new, new, Verdict.HOST_FULL]
    assert (known.verdict, room.verdict) == (Verdict.JOINED, new)


async def test_a_full_lane_still_takes_a_few_stops(tmp_path: Path) -> None:
    async with opened(tmp_path, lane_depth=2, host_depth=2) as journal:
        for n in range(2):
            await accept(journal, command(start(), f"start-{n}"))
        kinds = [
            (await accept(journal, command(stop(), f"stop-{n}"))).verdict
            for n in range(RESERVED + 1)
        ]
        late = await accept(journal, command(start(), "late"))

    assert kinds == [Verdict.NEW] * RESERVED + [Verdict.LANE_FULL]
    assert late.verdict is Verdict.LANE_FULL


async def test_unfinished_commands_attempts_and_steps_survive_a_restart(tmp_path: Path) -> None:
    given = command(start(), deadline_ms=5, issuer="me", traceparent="t", reply_to="_INBOX.1")
    async with opened(tmp_path) as journal:
        await accept(journal, given)
        await accept(journal, command(stop(), "c2"))
        assert journal.commands.begin_attempt("c1") == 1
        await journal.steps.begin("c1", intent("tap", "tn7i5"))
        await journal.steps.begin("c1", intent("jail", "j", existed=True))
        await journal.steps.mark("c1", "consumed")

    async with opened(tmp_path) as journal:
        assert [row.id for row in journal.commands.unfinished()] == ["c1", "c2"]
        assert journal.commands.unfinished()[0].command == given
        assert journal.commands.begin_attempt("c1") == 2
        assert await journal.steps.begin("c1", intent("tap", "tn7i5", existed=True)) == (
            StepRow("tap", "tn7i5", existed=False),
        )
        assert [row.mechanism for row in journal.steps.rows("c1")] == ["tap", "jail"]
        assert journal.steps.marked("c1", "consumed")
        assert not journal.steps.marked("c1", "other")
        assert journal.commands.lanes() == {Lane.instance(REF): 2}


async def test_an_outcome_deletes_all_steps_except_those_left_behind(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await accept(journal, command(start()))
        await journal.steps.begin("c1", intent("tap", "tn7i5"))
        await journal.steps.begin("c1", intent("pin", "p"))
        await finish(journal, ok(left_behind=("tap tn7i5",)))
        assert [row.key for row in journal.steps.leftovers()["c1"]] == ["tn7i5"]

    async with opened(tmp_path) as journal:
        assert [row.key for row in journal.steps.leftovers()["c1"]] == ["tn7i5"]
        await journal.steps.forget("c1", "tap", "tn7i5")
        assert journal.steps.leftovers() == {}


async def test_an_outcome_is_written_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await accept(journal, command(start()))
        await asyncio.gather(finish(journal, ok()), finish(journal, ok(changed=True)))
        await finish(journal, ok(changed=True))

        (kept,) = await journal.outbox.pending("reply", 10)
        assert codec.decode_reply(kept.payload) == ok()
        assert [e.kind for e in await events(journal)] == ["command"]


async def test_result_returns_the_state_of_a_command(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await accept(journal, command(start()))
        waiting = await journal.commands.result("c1")
        journal.commands.begin_attempt("c1")
        running = await journal.commands.result("c1")
        await finish(journal, ok())
        done = await journal.commands.result("c1")

        assert [s and s.state for s in (waiting, running, done)] == ["waiting", "running", "done"]
        assert done is not None
        assert done.reply == codec.encode_reply(ok())
        assert await journal.commands.result("never") is None


async def test_finished_commands_are_kept_a_day_and_pruned_in_batches(tmp_path: Path) -> None:
    now = 0
    clocks = {"clock_ms": lambda: now, "monotonic_s": lambda: now / 1000}
    async with opened(tmp_path, **clocks) as journal:
        for n in range(5):
            await accept(journal, command(start(), f"c{n}"))
            await finish(journal, ok(f"c{n}", finished_at_ms=n))
        await accept(journal, command(start(), "open"))
        now = journal_day = 24 * 3_600_000
        assert await journal.commands.prune() == 1
        now = journal_day + 4
        assert [await journal.commands.prune(limit=3) for _ in range(3)] == [3, 1, 0]
        assert (await accept(journal, command(start(), "c0"))).verdict is Verdict.NEW
        assert journal.commands.is_unfinished("open")


async def test_a_command_that_ends_in_its_first_pause_leaves_no_budget_behind(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:
        await accept(journal, command(start()))
        journal.commands.spend("c1", 1.5)
        await finish(journal, ok())
        left = await journal.store.writer.read(
            lambda tx: tx.execute("SELECT count(*) FROM retry").fetchone()
        )

    assert left == (0,)


async def test_a_redelivered_command_is_not_overtaken_in_its_lane(tmp_path: Path) -> None:
    """It waits for its commit, and so does the one behind it; those of other lanes do not."""
    order: list[str] = []
    async with opened(tmp_path) as journal:

        async def take(request: Request, command_id: str, *, redelivered: bool) -> None:
            lane = Lane.of_request(request)
            await journal.commands.take_in(
                command(request, command_id),
                lane=lane,
                subject=SUBJECTS.command(lane),
                stream_seq=1,
                received_at_ms=1,
                redelivered=redelivered,
            )
            order.append(command_id)

        await asyncio.gather(
            take(start(), "first", redelivered=True),
            take(stop(), "second", redelivered=False),
            take(start("a2"), "elsewhere", redelivered=False),
        )

    assert order == ["elsewhere", "first", "second"]
