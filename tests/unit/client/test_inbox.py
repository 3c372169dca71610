"""Whose reply a client takes: that of the host and the request that it waits for."""

import pytest

from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Form, Reply
from schemas.requests import Ok
from worker.bus.message import Message
from worker.client.inbox import Inbox

ID, DIGEST, OTHER = "job-1", "a" * 32, "b" * 32


def reply(host: str, *, digest: str | None = DIGEST) -> bytes:
    found = Reply(
        id=ID,
        host_id=host,
        response=Ok(),
        code=Code.OK,
        received_at_ms=1,
        finished_at_ms=2,
        request_digest=digest,
    )
    return codec.encode_reply(found, Form.NAMED)


def receive(inbox: Inbox, subject: str, data: bytes) -> None:
    inbox._receive(Message(subject, "", data, {}))


async def test_the_reply_of_another_host_to_the_same_id_is_not_taken() -> None:
    inbox = Inbox("_INBOX.x.reply")
    with inbox.expect("h1", ID, DIGEST) as one, inbox.expect("h2", ID, DIGEST) as two:
        receive(inbox, one.subject, reply("h1"))

        assert one.arrived.done()
        assert not two.arrived.done()


async def test_the_reply_to_another_request_with_the_same_id_is_not_taken() -> None:
    inbox = Inbox("_INBOX.x.reply")
    with inbox.expect("h1", ID, DIGEST) as expected:
        receive(inbox, expected.subject, reply("h1", digest=OTHER))
        assert not expected.arrived.done()

        receive(inbox, expected.subject, reply("h1"))
        assert expected.arrived.done()


@pytest.mark.parametrize("data", [reply("h1", digest=None), b"no map"])
async def test_what_does_not_say_whose_it_is_is_taken(data: bytes) -> None:
    inbox = Inbox("_INBOX.x.reply")
    with inbox.expect("h1", ID, DIGEST) as expected:
        receive(inbox, expected.subject, data)

        assert expected.arrived.result() == data


async def test_a_reply_that_nobody_expects_any_more_is_dropped() -> None:
    inbox = Inbox("_INBOX.x.reply")
    with inbox.expect("h1", ID, DIGEST) as expected:
        pass

    receive(inbox, expected.subject, reply("h1"))

    assert not expected.arrived.done()
