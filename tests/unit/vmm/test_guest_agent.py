"""The agent client against misbehaving guests, simulated by a server on the vsock socket."""

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path

import pytest

from handlers.errors import HostFault, Unavailable
from handlers.host.vmm import guest_agent as module
from handlers.host.vmm.guest_agent import FRAME_BYTES, GuestAgents
from handlers.specs import Ack
from schemas.settings import PathSettings, Settings

JAIL = "0123456789ab-1"
HANGS_S = 60.0  # fails a test that would hang, not one on a slow machine
PORT = 5252
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.contextmanager
def short(directory: Path) -> Generator[str]:
    """A path of the directory that fits the address of a socket, however long TMPDIR is."""
    there = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{there}"
    finally:
        os.close(there)


class Guest:
    """Each connection takes the next of `plays`; the last one is repeated."""

    def __init__(self, directory: Path, *plays: Serve) -> None:
        self.root = directory / "jails" / "firecracker" / JAIL / "root"
        self.root.mkdir(parents=True)
        self.agents = GuestAgents(Settings(paths=PathSettings(state=str(directory))))
        self.connections = 0
        self._plays = plays

    async def __aenter__(self) -> GuestAgents:
        with short(self.root) as root:
            self._server = await asyncio.start_unix_server(self._serve, f"{root}/v.sock")
        return self.agents

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        play = self._plays[min(self.connections, len(self._plays) - 1)]
        self.connections += 1
        try:
            await play(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def answers(reply: object | bytes, *, raw: bool = False) -> Serve:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"CONNECT 5252\n"
        writer.write(b"OK 1073741824\n")
        (length,) = struct.unpack(">I", await reader.readexactly(4))
        await reader.readexactly(length)
        await frame(writer, reply, raw=raw)

    return play


async def frame(writer: asyncio.StreamWriter, reply: object, *, raw: bool = False) -> None:
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    writer.write(body if raw else struct.pack(">I", len(body)) + body)
    await writer.drain()


async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def silent_after_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"OK 1\n")
    await reader.read()


async def greets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"OK 1\n\0\0\0\2{}")
    await reader.read()


async def test_ping_is_answered_by_pong(tmp_path: Path) -> None:
    async with Guest(tmp_path, answers("Pong")) as agents:
        await agents.ping(JAIL, PORT, timeout_s=5)


async def test_acks_carry_success_and_detail(tmp_path: Path) -> None:
    reply = {"SleepPrepAck": {"success": False, "detail": "busy", "new": [1]}}
    async with Guest(tmp_path, answers(reply)) as agents:
        ack = await agents.sleep_prep(JAIL, PORT, drain_timeout_s=1, timeout_s=5)

    assert ack == Ack(success=False, detail="busy")


async def test_wake_needs_no_detail(tmp_path: Path) -> None:
    async with Guest(tmp_path, answers({"WakeAck": {"success": True}})) as agents:
        assert await agents.wake(JAIL, PORT, timeout_s=5) == Ack(success=True)


async def test_set_clock_returns_how_far_off_the_guest_was(tmp_path: Path) -> None:
    async with Guest(tmp_path, answers({"ClockAck": {"was_off_nanos": -2_500_000_000}})) as agents:
        assert await agents.set_clock(JAIL, PORT, timeout_s=5) == -2.5


async def test_a_connection_that_is_cut_or_silent_is_retried(tmp_path: Path) -> None:
    guest = Guest(tmp_path, cut, cut, silent, silent_after_ok, answers("Pong"))
    async with guest as agents:
        await agents.ping(JAIL, PORT, timeout_s=10)

    assert guest.connections == 5


async def test_a_slow_drain_is_awaited_and_not_requested_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_SILENCE_S", 0.5)

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"OK 1\n")
        (length,) = struct.unpack(">I", await reader.readexactly(4))
        await reader.readexactly(length)
        # The guest's work takes longer than a silence that ends an attempt.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 2 * module.FIRST_SILENCE_S)
        await frame(writer, {"SleepPrepAck": {"success": True, "detail": None}})

    guest = Guest(tmp_path, slow)
    async with guest as agents:
        ack = await agents.sleep_prep(JAIL, PORT, drain_timeout_s=1, timeout_s=5)

    assert ack.success
    assert guest.connections == 1


@pytest.mark.parametrize("play", [silent, silent_after_ok, cut])
async def test_a_guest_that_never_replies_is_unavailable_when_the_time_is_up(
    tmp_path: Path, play: Serve
) -> None:
    async with Guest(tmp_path, play) as agents:
        async with asyncio.timeout(HANGS_S):
            with pytest.raises(Unavailable, match=r"within 0\.2 s"):
                await agents.ping(JAIL, PORT, timeout_s=0.2)


@pytest.mark.parametrize(
    "play",
    [
        answers(b"\xff\xff\xff\xff", raw=True),
        answers(struct.pack(">I", FRAME_BYTES + 1), raw=True),
        answers(b"not json"),
        answers(b"\xff\xfe"),
        answers(b"[" * 200_000),
        answers(b'{"x":' + b"[" * 200_000),
        answers({"SleepPrepAck": {"success": "yes"}}),
        answers({"WakeAck": {"success": True}}),
        answers("Wake"),
        answers(7),
        greets,
    ],
    ids=[
        "length",
        "cap",
        "text",
        "utf8",
        "nesting",
        "hidden",
        "type",
        "other",
        "name",
        "int",
        "early",
    ],
)
async def test_an_invalid_reply_is_unavailable(tmp_path: Path, play: Serve) -> None:
    async with Guest(tmp_path, play) as agents:
        with pytest.raises(Unavailable):
            await agents.sleep_prep(JAIL, PORT, drain_timeout_s=1, timeout_s=5)


async def test_the_quoted_error_of_an_agent_is_bounded_and_printable(tmp_path: Path) -> None:
    reply = {"Error": {"message": "unknown\n\x1b[31m" + "x" * 1000}}
    async with Guest(tmp_path, answers(reply)) as agents:
        with pytest.raises(Unavailable) as refused:
            await agents.set_clock(JAIL, PORT, timeout_s=5)

    quoted = refused.value.detail["agent"]
    assert len(quoted) == 200
    assert quoted.isprintable()


async def test_a_socket_without_a_listener_ends_the_retries_early(tmp_path: Path) -> None:
    guest = Guest(tmp_path, silent)
    with socket.socket(socket.AF_UNIX) as left, short(guest.root) as root:
        left.bind(f"{root}/v.sock")  # its file stays, as a killed VMM's does

    async with asyncio.timeout(HANGS_S):
        with pytest.raises(Unavailable, match=f"on port {PORT}: the VMM is gone"):
            await guest.agents.ping(JAIL, PORT, timeout_s=float("inf"))


async def test_a_symlink_in_place_of_the_socket_is_not_followed(tmp_path: Path) -> None:
    guest = Guest(tmp_path, answers("Pong"))
    async with guest as agents:
        (guest.root / "v.sock").rename(tmp_path / "elsewhere")
        (guest.root / "v.sock").symlink_to(tmp_path / "elsewhere")

        with pytest.raises(HostFault, match="not a socket"):
            await agents.ping(JAIL, PORT, timeout_s=1)

    assert guest.connections == 0


async def test_a_socket_path_longer_than_sun_path_is_reached(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    guest = Guest(deep, answers("Pong"))
    with short(guest.root) as root:
        server = await asyncio.start_unix_server(guest._serve, f"{root}/v.sock")
    async with server:
        await guest.agents.ping(JAIL, PORT, timeout_s=5)


@pytest.mark.parametrize("number", [b"1" * 20, b"9" * 400, b"9" * 5000, b"-" + b"9" * 400])
async def test_a_clock_answer_beyond_any_clock_is_a_protocol_error(
    tmp_path: Path, number: bytes
) -> None:
    frame = b'{"ClockAck": {"was_off_nanos": ' + number + b"}}"

    async with Guest(tmp_path, answers(struct.pack(">I", len(frame)) + frame, raw=True)) as agents:
        with pytest.raises(Unavailable, match="cannot be decoded"):
            await agents.set_clock(JAIL, PORT, timeout_s=5)
