"""The measured host: a worker process with its own nats-server, and a sender."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from bench.cpu import LOOK_S, cpu_s, kernel_s, own_processes, quiet
from bench.sender import Sender
from schemas.requests import InstanceRef, Ping
from tests.live_host import LiveHost, live_host
from worker.cli.client import Client, connect
from worker.cli.seed import Seeded
from worker.demo.host import environment_of

FULL_WITHIN_S = 120.0
AS_INSTALLED = "bench.as_installed"


@dataclass(frozen=True, slots=True)
class BenchHost:
    """The measured host with a sender. `processes` are the worker and its own helpers."""

    host: LiveHost
    client: Client
    sender: Sender
    processes: tuple[int, ...]

    def seed(self, name: str, *, tenant: str = "acme", net_id: int = 7, **more: Any) -> Seeded:
        return self.host.seed(InstanceRef(tenant, "web", name), net_id=net_id, **more)

    def cpu_ms(self) -> float:
        """CPU time that the worker has used so far."""
        return cpu_s(*self.processes) * 1e3

    def kernel_ms(self) -> float:
        """What of it the kernel used; see `kernel_s`."""
        return kernel_s(*self.processes) * 1e3

    async def quiet(self) -> None:
        """Wait until the worker has done what comes after its replies."""
        await quiet(*self.processes)

    async def refilled(self) -> None:
        """Wait until the warm pool looks full, without asking the worker; at once without one."""
        size = self.host.settings.vmm.warm_pool
        async with asyncio.timeout(FULL_WITHIN_S):
            while size:
                await asyncio.sleep(LOOK_S)
                if (await self.host.inventory())["warm"] >= size:
                    break
        await self.quiet()

    async def until_warm(self) -> None:
        """Wait until the whole warm pool can be taken; at once without one."""
        size = self.host.settings.vmm.warm_pool
        async with asyncio.timeout(FULL_WITHIN_S):
            while size:
                await self.refilled()
                if (await self.sender.send(Ping())).reply["detail"]["warm_vmms"] >= size:
                    return


def worker_pid(host: LiveHost) -> int:
    assert host.worker is not None
    return host.worker.pid


@contextlib.asynccontextmanager
async def bench_host(*, program: str = "", **options: Any) -> AsyncGenerator[BenchHost]:
    """A host in a private network namespace; leaves nothing behind.

    `program` is run instead of the worker: a module that wraps it.
    """
    async with live_host(worker=not program, wrapper=AS_INSTALLED, **options) as host:
        if program:
            await start_program(host, program)
        async with attached(host) as bench:
            yield bench


@contextlib.asynccontextmanager
async def attached(host: LiveHost) -> AsyncGenerator[BenchHost]:
    """A connection and a sender to a host whose worker is ready."""
    async with connect(host.settings) as client:
        sender = Sender(client.nats, host.subjects)
        await sender.start()
        processes = tuple(own_processes(worker_pid(host)))
        yield BenchHost(host, client, sender, processes)


async def start_program(host: LiveHost, module: str, **environment: str) -> None:
    """Start a module in place of the worker, with the host's settings; wait until it is ready."""
    variables = os.environ | environment_of(host.settings) | environment
    with open(f"{host.directory}/worker.log", "ab") as log:
        host.worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, stdout=log, stderr=log, env=variables
        )
    await host.wait_ready()
