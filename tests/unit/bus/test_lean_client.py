"""The client's own publications and requests, on a transport in memory."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from nats import errors
from nats.aio.client import Client

from worker.bus.lean_client import BUFFERED_MAX, LeanClient, encode_headers
from worker.bus.message import Message

ANSWERS = "_INBOX.me."


class Socket:
    """Keeps what each system call would send; `buffered` is what the peer has not read."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.buffered = 0
        self.transport = self

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def get_write_buffer_size(self) -> int:
        return self.buffered


def connected() -> tuple[LeanClient, Socket]:
    client, socket = LeanClient(tls=False), Socket()
    parts: Any = client
    parts._transport = SimpleNamespace(_io_writer=socket)
    parts._status = Client.CONNECTED
    parts._flush_queue = asyncio.Queue()
    parts._max_pending_size = 1000
    parts._answers = ANSWERS
    return client, socket


def answer(client: LeanClient, to: bytes, data: bytes, headers: bytes = b"") -> None:
    """As the parser calls the client."""
    client._listeners[7] = client._answered
    assert client.take(7, to, b"", data, headers)


def reply_subject(line: bytes) -> bytes:
    return line.split(b" ")[2]


async def test_messages_of_one_turn_are_one_write_in_the_next() -> None:
    client, socket = connected()

    client.put("a", b"1")
    client.put("b", b"2", reply="r")
    client.put("c", b"3", headers=encode_headers({"Name": "value"}))
    before = list(socket.calls)
    await asyncio.sleep(0)

    assert before == []
    head = b"NATS/1.0\r\nName: value\r\n\r\n"
    assert socket.calls == [
        b"PUB a  1\r\n1\r\nPUB b r 1\r\n2\r\n"
        + f"HPUB c  {len(head)} {len(head) + 1}\r\n".encode()
        + head
        + b"3\r\n"
    ]


async def test_what_must_go_first_is_written_at_once() -> None:
    client, socket = connected()

    client.put("a", b"1")
    client.write_now()
    client.put("b", b"2")
    await asyncio.sleep(0)

    assert socket.calls == [b"PUB a  1\r\n1\r\n", b"PUB b  1\r\n2\r\n"]


async def test_a_peer_that_does_not_read_gets_no_more_and_a_sender_is_told() -> None:
    client, socket = connected()
    socket.buffered = BUFFERED_MAX + 1

    for _ in range(20):
        client.put("a", b"x" * 100)
        await asyncio.sleep(0)

    queue: Any = client._flush_queue
    assert socket.calls == []
    assert client.congested
    assert queue.qsize() == 1  # nats-py's flusher writes it, and waits for the peer


async def test_more_than_a_peer_takes_at_once_is_left_to_whom_waits_for_the_peer() -> None:
    client, socket = connected()

    client.put("a", b"x" * (BUFFERED_MAX + 1))
    await asyncio.sleep(0)

    queue: Any = client._flush_queue
    assert (socket.calls, queue.qsize()) == ([], 1)


async def test_nothing_is_written_while_the_connection_is_lost_and_nothing_is_dropped() -> None:
    client, socket = connected()
    parts: Any = client
    parts._status = Client.RECONNECTING

    client.put("a", b"1")
    await asyncio.sleep(0)
    parts._status = Client.CONNECTED
    client.put("b", b"2")
    await asyncio.sleep(0)

    assert socket.calls == [b"PUB a  1\r\n1\r\nPUB b  1\r\n2\r\n"]


async def test_each_request_gets_the_first_answer_to_its_own_subject() -> None:
    client, socket = connected()
    asking = [asyncio.create_task(client.ask(name, b"?", timeout_s=60)) for name in ("one", "two")]
    while not socket.calls:
        await asyncio.sleep(0)
    first, second = (reply_subject(each) for each in socket.calls[0].splitlines()[::2])

    answer(client, second, b"2")
    answer(client, second, b"late")
    answer(client, first, b"1")
    answer(client, ANSWERS.encode() + b"unknown", b"forged")

    assert [got.data for got in await asyncio.gather(*asking)] == [b"1", b"2"]
    assert first != second
    assert client._asked == {}


async def test_a_request_without_an_answer_times_out() -> None:
    client, _ = connected()

    with pytest.raises(errors.TimeoutError):
        await client.ask("one", b"?", timeout_s=0.001)

    assert client._asked == {}


async def test_a_cancelled_request_ends_whether_or_not_its_answer_is_there() -> None:
    client, socket = connected()
    for answered in (False, True):
        asking = asyncio.create_task(client.ask("one", b"?", timeout_s=60))
        while not socket.calls:
            await asyncio.sleep(0)
        if answered:
            answer(client, reply_subject(socket.calls[0]), b"1")
        socket.calls.clear()

        asking.cancel()

        with pytest.raises(asyncio.CancelledError):
            await asking
        assert client._asked == {}


async def test_no_reply_subject_tells_the_next_one() -> None:
    client, socket = connected()
    asking = [asyncio.create_task(client.ask("one", b"?", timeout_s=60)) for _ in range(300)]
    while not socket.calls:
        await asyncio.sleep(0)
    subjects = [reply_subject(each) for each in socket.calls[0].splitlines()[::2]]

    tokens = {int(each.removeprefix(ANSWERS.encode()), 16) for each in subjects}
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)

    assert len(tokens) == 300
    assert max(tokens) - min(tokens) > 2**60


async def test_a_listener_that_raises_stops_nobody() -> None:
    client, _ = connected()

    def bad(_: Message) -> None:
        raise RuntimeError("a bug of a listener")

    client._listeners[3] = bad

    assert client.take(3, b"a", b"", b"x", b"")


@pytest.mark.parametrize("subject", ["", "a b", "a\tb", "a\r\nPUB x 0", "a\nb"])
async def test_a_subject_that_would_be_another_command_is_refused(subject: str) -> None:
    client, socket = connected()

    with pytest.raises(errors.BadSubjectError):
        client.put(subject, b"x")
    await asyncio.sleep(0)

    assert socket.calls == []


def test_a_header_cannot_begin_another_one() -> None:
    with pytest.raises(errors.BadHeaderError):
        encode_headers({"A\r\nB": "c"})

    assert encode_headers({"A": "b\r\nC: d"}) == b"NATS/1.0\r\nA: b  C: d\r\n\r\n"
    assert encode_headers({}) == b""


@pytest.mark.parametrize("error", [RuntimeError("the handler is closed"), BrokenPipeError()])
async def test_a_transport_that_has_just_closed_is_reported_not_raised(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, socket = connected()

    def refuse(_: bytes) -> None:
        raise error

    monkeypatch.setattr(socket, "write", refuse)
    client.put("a", b"1")

    assert client.write_now() is False
