"""The connection without a server: it ends when it is asked to, whatever nats-py waits for."""

import asyncio
import contextlib
import time
from typing import Any, NoReturn

import pytest
from nats import errors

from schemas.settings import NatsSettings
from tests.unit.bus.test_lean_client import connected
from worker.bus.connection import Connection


@pytest.mark.parametrize("turns", range(6))
async def test_a_connection_ends_though_it_is_refused_at_the_same_time(
    turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one of these turns of the loop, wait_for of Python 3.11 drops the cancellation."""
    trying = asyncio.Event()
    refuse = asyncio.Event()

    async def open_connection(*_: object, **__: object) -> NoReturn:
        trying.set()
        await refuse.wait()
        refuse.clear()
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    connection = Connection(NatsSettings(url="nats://127.0.0.1:1"), name="t", inbox="_INBOX.t")
    await connection.start()
    await trying.wait()
    trying.clear()

    refuse.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    closing = asyncio.create_task(connection.close())
    again = asyncio.create_task(trying.wait())
    await asyncio.wait([closing, again], return_when=asyncio.FIRST_COMPLETED)
    lost = again.done() and not closing.done()
    again.cancel()
    closing.cancel()
    await asyncio.gather(again, closing, return_exceptions=True)

    assert not lost


async def test_replies_to_a_connection_that_has_just_closed_do_not_count_as_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection: Any = Connection(NatsSettings(url="nats://127.0.0.1:1"), name="t", inbox="_INBOX.t")
    connection._client, socket = connected()

    assert connection.send_now([("_INBOX.1", b"a")]) == 1

    def refuse(_: bytes) -> NoReturn:
        raise RuntimeError("the handler is closed")

    monkeypatch.setattr(socket, "write", refuse)
    assert connection.send_now([("_INBOX.1", b"a")]) == 0


async def test_a_denial_is_of_its_subject_whatever_its_case_and_of_its_time() -> None:
    connection: Any = Connection(NatsSettings(url="nats://127.0.0.1:1"), name="t", inbox="_INBOX.t")
    subject = "$JS.hostd.API.STREAM.INFO.X"
    before = time.monotonic()
    violation = errors.Error(f'nats: Permissions Violation for Publish to "{subject}"'.lower())
    await connection._on_error(violation)
    after = time.monotonic() + 1e-9

    assert "permissions violation" in connection.denial(subject, before)
    assert connection.denial("$JS.hostd.API.STREAM.INFO.Y", before) == ""
    assert connection.denial(subject, after) == ""  # the permission may be there by now
    await connection._on_error(violation)
    assert connection.denial(subject, after)


async def test_a_cancellation_that_nats_py_swallows_ends_a_request_that_fails_afterwards() -> None:
    class Flushing:
        is_connected, is_clustered, max_payload = True, False, 1 << 20

        async def ask(self, *_: object, **__: object) -> NoReturn:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            raise errors.TimeoutError

    connection: Any = Connection(NatsSettings(url="nats://127.0.0.1:1"), name="t", inbox="_INBOX.t")
    connection._client = Flushing()
    request = asyncio.create_task(connection.request("s", b""))
    await asyncio.sleep(0)

    request.cancel()

    with pytest.raises(asyncio.CancelledError):
        await request
