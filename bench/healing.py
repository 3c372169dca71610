"""How long commands are not answered after a fault of the bus: restart or hang."""

import asyncio
import time

import msgspec

from bench.bench_host import AS_INSTALLED, BenchHost, attached
from bench.report.budgets import at_most
from bench.report.rows import Measured, row
from schemas.requests import Ping, StopInstance
from tests.broker.proxy import Proxy
from tests.live_host import LiveHost, live_host

FAULTS = 3
RESTART_MS, STALL_MS = 2000.0, 15_000.0
NOTHING = StopInstance("acme", "web", "i-0")


async def measure(faults: int = FAULTS) -> Measured:
    """The worker's connection goes through a proxy; the sender's does not."""
    async with live_host(worker=False, wrapper=AS_INSTALLED) as host:
        proxy = Proxy(host.nats.port)
        await proxy.start()
        direct = host.settings
        through = msgspec.structs.replace(direct.nats, url=proxy.url)
        host.settings = msgspec.structs.replace(direct, nats=through)
        try:
            await host.start_worker(ready=False)
            host.settings = direct
            await host.wait_ready()
            async with attached(host) as bench:
                bench.seed("i-0")
                await bench.sender.send(Ping())
                stalled = [await after_a_stall(bench, proxy) for _ in range(faults)]
            restarted = [await after_a_restart(host) for _ in range(faults)]
        finally:
            host.settings = direct
            await host.kill_worker()
            await proxy.close()
    return Measured(
        [
            row("nats-server restarts: ready to first reply", "ms", restarted,
                budget=at_most(RESTART_MS)),
            row("connection hangs: to first reply", "ms", stalled, budget=at_most(STALL_MS)),
        ]
    )  # fmt: skip


async def after_a_stall(bench: BenchHost, proxy: Proxy) -> float:
    """Nothing is read or written on the worker's connection any more, and nobody closes it."""
    began = time.monotonic()
    proxy.stall()
    await bench.sender.send(NOTHING)
    took_ms = (time.monotonic() - began) * 1e3
    await asyncio.sleep(1)
    return took_ms


async def after_a_restart(host: LiveHost) -> float:
    """From the moment that the new server serves a sender."""
    await host.nats.stop()
    await host.nats.start()
    async with attached(host) as bench:
        began = time.monotonic()
        await bench.sender.send(NOTHING)
        took_ms = (time.monotonic() - began) * 1e3
        await asyncio.sleep(1)
    return took_ms
