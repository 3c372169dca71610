"""What is not there, what cannot be read now, and what may be asked again."""

import json
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from worker.bus.message import Message
from worker.bus.protocol import BusError, Unsendable
from worker.client import link as link_module
from worker.client.errors import NoAnswer, NotFound
from worker.client.link import Link


@pytest.mark.parametrize(
    ("err_code", "raised"),
    [(10043, NotFound), (10037, NotFound), (10059, NotFound), (10008, NoAnswer), (None, NoAnswer)],
)
async def test_only_what_is_not_there_is_not_found(
    monkeypatch: pytest.MonkeyPatch, err_code: int | None, raised: type[Exception]
) -> None:
    failure = {"code": 503, "description": "why", "err_code": err_code}

    async def answered(*_: object, **__: object) -> Message:
        return Message("", "", json.dumps({"error": failure}).encode(), {})

    monkeypatch.setattr(Link, "_ask_api", answered)
    link = Link.__new__(Link)

    with pytest.raises(raised, match="why"):
        await cast("Any", link).delete("HOSTD_DEAD_default", 7)


@dataclass
class Electing:
    """A connection to a cluster, or to a single server, which answers after some timeouts."""

    timeouts: int
    is_clustered: bool = True
    denied: str = ""
    raised: type[BusError] = BusError
    asked: list[str] = field(default_factory=list[str])

    @property
    def client(self) -> "Electing":
        return self

    def on_loss(self, _listener: object) -> None: ...
    def on_up(self, _listener: object) -> None: ...

    def denial(self, _subject: str, _since: float) -> str:
        return self.denied

    async def request(self, subject: str, _payload: bytes, **_: object) -> Message:
        self.asked.append(subject)
        if len(self.asked) <= self.timeouts:
            raise self.raised(f"{subject}: timeout")
        state = {"last_seq": 7}
        return Message("", "", json.dumps({"state": state, "success": True}).encode(), {})


def link_over(connection: Electing, monkeypatch: pytest.MonkeyPatch) -> Link:
    monkeypatch.setattr(link_module, "AGAIN_S", 0)
    return Link(cast("Any", connection), "")


async def test_a_stream_that_does_not_answer_while_it_elects_a_leader_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = Electing(timeouts=2)

    assert await link_over(connection, monkeypatch).last_seq("EVT") == 7
    assert len(connection.asked) == 3


@pytest.mark.parametrize(
    "connection",
    [
        Electing(timeouts=9, is_clustered=False),
        Electing(timeouts=9, denied="permissions violation"),
        Electing(timeouts=9, raised=Unsendable),
    ],
    ids=["single server", "denied", "too large"],
)
async def test_what_no_election_explains_is_asked_once(
    connection: Electing, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoAnswer, match=connection.denied or "timeout"):
        await link_over(connection, monkeypatch).last_seq("EVT")

    assert len(connection.asked) == 1


async def test_a_deletion_without_an_answer_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = Electing(timeouts=1)

    with pytest.raises(NoAnswer, match="timeout"):
        await link_over(connection, monkeypatch).delete("DEAD", 7)

    assert len(connection.asked) == 1
