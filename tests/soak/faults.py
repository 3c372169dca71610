"""What happens to the host meanwhile: kill -9 of worker, VMMs and servers, the leader lost."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.soak.cluster import SIZE, SoakHost

WORKER_S = (30.0, 90.0)  # between two kills of the worker
VMM_S = (10.0, 30.0)
SERVER_S = (20.0, 60.0)
DOWN_S = (0.5, 5.0)  # how long what was killed stays away


@dataclass
class Faults:
    """Runs until cancelled, and leaves everything up. `log` has each fault with its second."""

    host: SoakHost
    dice: random.Random
    began: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter[str])
    log: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    worker_up: asyncio.Event = field(default_factory=asyncio.Event)
    worker_since: float = 0.0

    async def run(self, ending: asyncio.Event) -> None:
        """Until `ending`; then the worker and all servers run."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.kill_workers(ending))
            group.create_task(self.kill_vmms(ending))
            group.create_task(self.kill_servers(ending))

    def note(self, what: str, detail: str = "") -> None:
        self.counts[what] += 1
        self.log.append((round(time.monotonic() - self.began, 1), f"{what} {detail}".strip()))

    async def kill_workers(self, ending: asyncio.Event) -> None:
        while not await passed(ending, self.dice.uniform(*WORKER_S)):
            self.worker_up.clear()
            await self.host.kill_worker()
            self.note("kill -9 of the worker")
            await asyncio.sleep(self.dice.uniform(*DOWN_S))
            await self.start_worker()

    async def start_worker(self) -> None:
        await self.host.start_worker(ready=False)
        # It may have to wait for a server that is down.
        await self.host.wait_ready(timeout_s=120)
        self.worker_since = time.monotonic()
        self.worker_up.set()

    async def kill_vmms(self, ending: asyncio.Event) -> None:
        while not await passed(ending, self.dice.uniform(*VMM_S)):
            with contextlib.suppress(OSError):
                if pids := self.host.vm_pids():
                    os.kill(self.dice.choice(pids), signal.SIGKILL)
                    self.note("kill -9 of a VMM")

    async def kill_servers(self, ending: asyncio.Event) -> None:
        """One at a time: two of three keep a quorum."""
        cluster = self.host.cluster
        while not await passed(ending, self.dice.uniform(*SERVER_S)):
            which = await cluster.leader(self.host.settings, self.host.subjects.commands_stream)
            loses_leader = which is not None and self.dice.random() < 0.5
            if which is None or not loses_leader:
                which = self.dice.randrange(SIZE)
            self.note("leader lost" if loses_leader else "server lost", f"n{which}")
            node = cluster.nodes[which]
            await asyncio.to_thread(node.kill if self.dice.random() < 0.7 else node.stop)
            await asyncio.sleep(self.dice.uniform(*DOWN_S))
            node.start()


async def passed(ending: asyncio.Event, seconds: float) -> bool:
    """Wait; whether it is time to end."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ending.wait(), seconds)
    return ending.is_set()
