"""Kills a worker at a failpoint, and checks the outcome of its command afterwards."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from nats.aio.msg import Msg

from schemas.requests import Request
from tests.live_host import LiveHost
from tests.plain import unpacked
from worker.cli.control_client import ControlClient
from worker.failpoints import FILE, POINT


async def until(holds: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Wait until it holds; the deadline is a failure that says what did not come."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"{what} did not come within {timeout_s:g} s"
        await asyncio.sleep(0.005)


async def stop_at(host: LiveHost, moment: str, request: Request, command_id: str) -> None:
    """Start a new worker that stops at a failpoint of the command."""
    reached = Path(host.directory, f"failpoint-{command_id}")
    await host.stop_worker()
    await host.start_worker(environment={POINT: moment, FILE: str(reached)})
    await host.publish(request, command_id)
    await until(reached.exists, moment)
    assert reached.read_text(encoding="ascii") == moment


async def kill_at(host: LiveHost, moment: str, request: Request, command_id: str) -> None:
    """SIGKILL the worker at a failpoint of the command, from this process."""
    await stop_at(host, moment, request, command_id)
    await host.kill_worker()


async def kill_while(host: LiveHost, request: Request, command_id: str, reached: Path) -> None:
    """SIGKILL a worker, which was started with a failpoint to arm, at that point of the command.

    Not at the same point of an earlier command: the replies of those have left its journal.
    """
    control = ControlClient(host.settings)
    async with asyncio.timeout(20):
        while any((await asyncio.to_thread(control.get, "/v1/dump"))["journal"]["unsent"].values()):
            await asyncio.sleep(0.02)
    Path(f"{reached}.armed").touch()
    await host.publish(request, command_id)
    await until(reached.exists, f"{command_id} at its failpoint")
    await host.kill_worker()


async def events(host: LiveHost) -> list[dict[str, Any]]:
    """All events of the host so far, in the order of the stream."""
    kept = await host.kept(host.subjects.events_stream)
    return [unpacked(data) for _, _, data in kept]


async def wait_event(
    host: LiveHost, found: Callable[[dict[str, Any]], bool], timeout_s: float = 20
) -> dict[str, Any]:
    """The first such event, once the stream has it."""
    async with asyncio.timeout(timeout_s):
        while True:
            for event in await events(host):
                if found(event):
                    return event
            await asyncio.sleep(0.02)


async def assert_one_outcome(host: LiveHost, command_id: str) -> dict[str, Any]:
    """The command's one reply: kept once, told of once, in a gapless row of events."""
    await wait_event(host, lambda event: event.get("command_id") == command_id)
    told = await events(host)
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))
    ends = [e for e in told if e["kind"] == "command" and e["command_id"] == command_id]
    assert len(ends) == 1
    (reply,) = await host.replies(command_id)
    assert await host.result(command_id) == reply
    return reply


class Heard:
    """What one subscriber hears of the host's events, live: each with its time of arrival."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[float, dict[str, Any]]] = asyncio.Queue()

    def note(self, data: bytes) -> None:
        self._queue.put_nowait((time.monotonic(), unpacked(data)))

    async def first(self, kind: str, timeout_s: float = 20, **facts: Any) -> tuple[float, Any]:
        """The next such event and when (monotonic) it came; what comes before it is dropped."""
        async with asyncio.timeout(timeout_s):
            while True:
                at, event = await self._queue.get()
                if event["kind"] == kind and facts.items() <= event.items():
                    return at, event


@contextlib.asynccontextmanager
async def listening(host: LiveHost) -> AsyncGenerator[Heard]:
    """Hear the events from now on, over a connection of one's own."""
    heard = Heard()

    async def note(message: Msg) -> None:
        heard.note(message.data)

    async with host.client() as client:
        await client.nats.subscribe(f"{host.settings.root}.{host.settings.host.id}.evt.>", cb=note)
        await client.nats.flush()
        yield heard
