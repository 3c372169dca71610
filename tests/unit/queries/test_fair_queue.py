"""Questions of many askers: bounded, in turn, and one who floods loses only its own."""

import asyncio

import pytest

from worker.queries import fair_queue
from worker.queries.fair_queue import RUNNING_EACH, RUNNING_MAX, WAITING_EACH, FairQueue


class Questions:
    """Work that waits for the gate; the order in which it began, and the most at once."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.gate = asyncio.Event()
        self.began: list[str] = []
        self.running: list[str] = []
        self.most: dict[str, int] = {}
        self.most_of_all = 0

    def ask(self, asker: str, count: int = 1) -> None:
        async def work() -> None:
            self.began.append(asker)
            self.running.append(asker)
            self.most[asker] = max(self.most.get(asker, 0), self.running.count(asker))
            self.most_of_all = max(self.most_of_all, len(self.running))
            await self.gate.wait()
            self.running.remove(asker)

        for _ in range(count):
            self.queue.put(asker, work)


async def test_each_asker_has_a_bounded_part_and_all_together_too() -> None:
    questions = Questions()
    for asker in ("a", "b", "c"):
        questions.ask(asker, 20)
    await asyncio.sleep(0)
    assert len(questions.running) == RUNNING_MAX
    questions.gate.set()
    await questions.queue.close()

    assert all(most <= RUNNING_EACH for most in questions.most.values())
    assert questions.most_of_all == RUNNING_MAX
    assert len(questions.began) == 60
    assert questions.queue.dropped == 0
    assert not questions.queue.busy


async def test_a_flood_delays_another_by_what_runs_and_costs_only_its_sender() -> None:
    questions = Questions()
    questions.ask("flood", 10_000)
    questions.ask("other", 3)
    await asyncio.sleep(0)

    assert questions.began == ["flood"] * RUNNING_EACH + ["other"] * 3
    assert questions.queue.dropped == 10_000 - RUNNING_EACH - WAITING_EACH
    questions.gate.set()
    await questions.queue.close()


async def test_askers_have_their_turn_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "RUNNING_MAX", 1)
    questions = Questions()
    questions.gate.set()
    questions.ask("a", 4)
    questions.ask("b", 2)
    questions.ask("c", 1)
    await questions.queue.close()

    assert questions.began == ["a", "a", "b", "c", "a", "b", "a"]


async def test_when_all_places_are_taken_the_longest_queue_loses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fair_queue, "WAITING_MAX", WAITING_EACH + 10)
    questions = Questions()
    questions.ask("flood", RUNNING_EACH + WAITING_EACH)
    for n in range(30):
        questions.ask(f"other-{n}")

    assert questions.queue.dropped == 30 - (RUNNING_MAX - RUNNING_EACH) - 10
    questions.gate.set()
    await questions.queue.close()
    assert {f"other-{n}" for n in range(30)} <= set(questions.began)
