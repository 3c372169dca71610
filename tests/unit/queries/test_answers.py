"""Answers to questions come from memory or a reader of their own, never through the writer."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from msgspec import to_builtins

from handlers.errors import NotFound
from schemas.codec import request_digest
from schemas.envelopes import EventKind
from schemas.protocol.queries import ANSWERS, ExplainAnswer
from schemas.requests import SleepInstance
from schemas.subjects import Lane
from schemas.unpack import pack
from schemas.usage import InstanceUsage, TenantUsage
from tests.fakes.host import seeded
from tests.fakes.shell_worker import REF, SUBJECTS, FakeHandlers, shell_worker, start
from tests.plain import unpacked
from worker.journal.journal import Journal
from worker.journal.transaction import EventDraft
from worker.queries.answers import Answer, Answers
from worker.queries.service import QuerySource
from worker.queries.usage import usage_of

LANE = Lane.instance(REF)
QUESTIONS: dict[str, Callable[[Answers], Awaitable[Answer | InstanceUsage | TenantUsage]]] = {
    "ping": lambda answers: answers.ping(),
    "status": lambda answers: answers.status(),
    "list": lambda answers: answers.list(),
    "describe": lambda answers: answers.describe("none", None, None),
    "usage": lambda answers: answers.usage("acme", "web", "i-1"),
    "explain": lambda answers: answers.explain({}),
    "result": lambda answers: answers.result("c1"),
    "result of an unknown command": lambda answers: answers.result("c9"),
}


def answers_of(journal: Journal) -> Answers:
    async def explain(_request: object) -> ExplainAnswer:
        return {
            "v": 1, "type": "Ping", "lane": "host", "before": [], "provisional": False,
            "refused": None, "changes": False, "status": None, "why": None, "waits": [],
            "steps": [],
        }  # fmt: skip

    return Answers(
        journal,
        "b1",
        host_state=lambda: "ready",
        warm_vmms=lambda: 3,
        usage=partial(usage_of, seeded().host(journal.records)),
        explain=explain,
        vmm_versions=lambda: [{"version": "1.12.1"}],
    )


async def blocked(journal: Journal) -> tuple[asyncio.Future[bool], threading.Event]:
    """A writer whose thread is in the midst of a part until the event is set."""
    entered, gate = threading.Event(), threading.Event()

    def wait(_: object) -> bool:
        entered.set()
        return gate.wait(30)

    future = journal.store.writer.submit(wait)
    await asyncio.to_thread(entered.wait, 30)
    return future, gate


@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_question_is_answered_while_the_writer_is_busy(
    tmp_path: Path, question: str
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start())
        await worker.reply()
        await worker.outbox.drained()
        answers = answers_of(worker.journal)
        writing, gate = await blocked(worker.journal)
        try:
            async with asyncio.timeout(10):
                if question in ("describe", "usage", "result of an unknown command"):
                    with pytest.raises(NotFound):
                        await QUESTIONS[question](answers)
                else:
                    assert to_builtins(await QUESTIONS[question](answers))["v"] == 1
            assert not writing.done()
        finally:
            gate.set()
            assert await writing


async def test_a_finished_command_has_its_result_at_once(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        answers = answers_of(worker.journal)
        for n in range(20):
            worker.send(start(f"a{n}"), f"c{n}")
            await worker.reply(f"c{n}")

            assert (await answers.result(f"c{n}"))["state"] == "done"


async def test_a_result_says_of_which_request_it_is_in_each_state(tmp_path: Path) -> None:
    machine = FakeHandlers(gate=(gate := asyncio.Event()))
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        answers = answers_of(worker.journal)
        worker.send(start(), "c1")
        await machine.at_gate.wait()
        worker.send(sleep := SleepInstance("acme", "web", "a1", force=False), "c2")
        worker.bus.command(SUBJECTS.command(LANE), pack({"v": 1, "id": "c3", "request": "Grow"}))
        await worker.reply("c3")
        worker.send(start("a2"), "c4", reply_to="elsewhere.1")
        await worker.reply("c4")

        found = {key: await answers.result(key) for key in ("c1", "c2", "c3", "c4")}
        gate.set()
        await worker.reply("c1")
        done = await answers.result("c1")

    assert [found[key]["state"] for key in found] == ["running", "waiting", "done", "done"]
    assert found["c1"].get("request_digest") == request_digest(start())
    assert found["c2"].get("request_digest") == request_digest(sleep)
    assert "request_digest" not in found["c3"]
    assert found["c4"].get("request_digest") == request_digest(start("a2"))
    assert (done["state"], done.get("request_digest")) == ("done", request_digest(start()))


async def test_the_result_of_an_older_worker_says_of_which_request_it_is(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start())
        await worker.reply()
        without = {**unpacked(worker.bus.replies()[0].payload)}
        del without["request_digest"]
        await worker.journal.store.writer.submit(
            lambda tx: tx.execute("UPDATE command SET reply = ?", (pack(without),))
        )

        answer = await answers_of(worker.journal).result("c1")

        assert answer.get("request_digest") == request_digest(start())
        assert answer.get("reply") == without


@pytest.mark.parametrize("verb", ANSWERS)
def test_an_answer_has_the_type_that_its_schema_is_made_from(verb: str) -> None:
    """So the type checkers hold both together."""
    for source in (Answers, QuerySource):
        returned = get_type_hints(getattr(source, verb))["return"]

        assert ANSWERS[verb] == (get_args(returned) or (returned,))


async def test_the_statistics_count_and_name_no_tenant(tmp_path: Path) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        answers = answers_of(worker.journal)
        before = answers.stats()
        worker.send(start())
        async with asyncio.timeout(10):
            await machine.at_gate.wait()

        during = answers.stats()

        gate.set()
        await worker.reply()
        assert (before["unfinished"], before["lanes"]) == (0, 0)
        assert (during["unfinished"], during["lanes"]) == (1, 1)
        assert during["host_state"] == "ready"
        assert during["vmm_versions"] == [{"version": "1.12.1"}]


async def test_a_list_says_how_many_vmms_are_warm(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        assert (await answers_of(worker.journal).list())["warm_vmms"] == 3


async def test_a_list_reflects_the_events_up_to_its_seq_and_no_later_one(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        answers, store = answers_of(worker.journal), worker.journal.store
        worker.send(start())
        await worker.reply()
        await worker.outbox.drained()
        first = await answers.list()
        later = store.writer.submit(
            lambda tx: store.source.event(tx, EventDraft(EventKind.HOST, Lane.host()), 1)
        )
        # Committed by the writer's thread, not yet applied: this task has the loop.
        while store.seq == first["seq"]:
            time.sleep(0.001)
        during = await answers.list()
        await later

        assert first["journal_id"] == store.journal_id
        assert first["seq"] == during["seq"] == store.seq - 1
        assert (await answers.list())["seq"] == store.seq
    async with shell_worker(tmp_path / "j") as again:
        assert (await answers_of(again.journal).list())["seq"] == again.journal.store.seq
