"""What each command comes to on a whole host when nobody disturbs it: what a killed one is compared
with."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.constants import REF
from tests.crash.kills import events
from tests.crash.points import BEFORE, requests
from tests.live_host import LiveHost, live_host
from worker.failpoints import ALL, FILE, POINT


@dataclass(frozen=True, slots=True)
class End:
    """Of one command: the points that it went through, and what there is once it is done.

    `launches` counts executions of the jailer since the host was made.
    """

    moments: tuple[str, ...]
    reply: dict[str, Any]
    inventory: dict[str, int]
    status: str
    events: tuple[tuple[str | None, str | None], ...]
    launches: int


_known: dict[str, End] = {}


async def undisturbed(kind: str) -> End:
    """Run what the command needs and then the command, once per process."""
    if kind in _known:
        return _known[kind]
    async with live_host(worker=False) as host:
        reached = Path(host.directory, "points")
        await host.start_worker(environment={POINT: ALL, FILE: str(reached)})
        wanted = requests(host.seed().net)
        for earlier in BEFORE[kind]:
            assert (await host.run(wanted[earlier]))["code"] == "ok"
        await host.stop_worker()  # so that the replies of these are sent and forgotten
        reached.write_text("", encoding="ascii")
        await host.start_worker(environment={POINT: ALL, FILE: str(reached)})
        reply = await host.run(wanted[kind], "undisturbed")
        async with asyncio.timeout(20):
            while "after:reply" not in (moments := reached.read_text("ascii").split()):
                await asyncio.sleep(0.02)
        _known[kind] = End(
            moments=tuple(moments),
            reply=reply,
            inventory=await at_rest(host),
            status=await host._status(REF),
            events=await statuses(host),
            launches=host.jailer_runs(),
        )
    return _known[kind]


async def at_rest(host: LiveHost) -> dict[str, int]:
    """The inventory, once what a command leaves to the kernel and to the background is gone.

    That is when two looks in a row agree and no half-made file is there.
    """
    async with asyncio.timeout(30):
        last = await host.inventory()
        while True:
            await asyncio.sleep(0.05)
            now = await host.inventory()
            if now == last and not now["temp"]:
                return now
            last = now


async def statuses(host: LiveHost) -> tuple[tuple[str | None, str | None], ...]:
    """The instance's status events, in order: from, to."""
    return tuple((e.get("from"), e.get("to")) for e in await events(host) if e["kind"] == "status")
