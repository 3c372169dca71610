"""Provisioning a cluster whose servers have just started, by the answers of its leader."""

import json
from typing import Any, cast

import pytest

from schemas.subjects import Subjects
from worker.bus import provision as provisioning
from worker.bus.connection import Connection
from worker.bus.message import Message
from worker.bus.protocol import NotProvisioned
from worker.bus.provision import provision

SUBJECTS = Subjects(root="hostd", cell="c", host_id="h1")
OFFLINE = "no suitable peers for placement, peer offline"
TAGS = "no suitable peers for placement, tags not matched ['ssd']"


class Leader:
    """Refuses the first creations with 10005, then stores what it is asked for."""

    def __init__(self, refusals: int, why: str) -> None:
        self.refusals, self.why = refusals, why
        self.asked = 0

    async def request(self, subject: str, payload: bytes) -> Message:
        if ".INFO." in subject:
            return answer({"error": {"err_code": 10059, "description": "stream not found"}})
        self.asked += 1
        if self.asked <= self.refusals:
            return answer({"error": {"err_code": 10005, "description": self.why}})
        return answer({"config": json.loads(payload)})


def answer(body: dict[str, Any]) -> Message:
    return Message("_INBOX.1", "", json.dumps(body).encode(), {})


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provisioning, "ASK_AGAIN_S", 0.001)
    monkeypatch.setattr(provisioning, "JOINS_WITHIN_S", 0.2)


async def test_a_server_that_has_just_started_is_waited_for() -> None:
    leader = Leader(3, OFFLINE)

    made = await provision(cast("Connection", leader), SUBJECTS, [], replicas=3)

    assert {each.how for each in made} == {"made"}
    assert leader.asked == 3 + len(made)


async def test_one_that_stays_away_is_named_in_the_end() -> None:
    with pytest.raises(NotProvisioned, match="peer offline"):
        await provision(cast("Connection", Leader(10**6, OFFLINE)), SUBJECTS, [], replicas=3)


async def test_tags_that_no_server_has_are_not_waited_for() -> None:
    leader = Leader(10**6, TAGS)

    with pytest.raises(NotProvisioned, match="tags not matched"):
        await provision(cast("Connection", leader), SUBJECTS, [], replicas=3)
    assert leader.asked == 1
