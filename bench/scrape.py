"""What a scrape of `/metrics` takes with 1,000 instances on record: a real worker, over loopback.

The instances are stopped and have no VMM, so that they fit on any machine: a scrape reads sums that
the journal keeps, whatever the status (`tests/unit/test_scale.py` fails on a scan).
"""

import asyncio
import time

from bench.bench_host import BenchHost, attached
from bench.report.budgets import at_most
from bench.report.rows import Measured, row
from handlers.host.facts import HostFacts
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef
from tests.live_host import LiveHost
from worker.journal.journal import Journal

ROUNDS = 200
LISTEN = "127.0.0.1:9464"
INSTANCES, PER_TENANT = 1000, 20
SCRAPE_MS = 50.0


async def measure(bench: BenchHost, rounds: int = ROUNDS) -> Measured:
    """Each scrape has a connection of its own."""
    await bench.host.stop_worker()
    await populate(bench.host)
    await bench.host.start_worker()
    async with attached(bench.host) as full:
        await full.quiet()
        found: list[float] = []
        cpu_before = full.cpu_ms()
        for _ in range(rounds):
            began = time.monotonic()
            text = await scrape()
            found.append((time.monotonic() - began) * 1e3)
            if f'hostd_instances{{status="stopped"}} {INSTANCES}.0' not in text:
                raise RuntimeError("the instances are not there")
        cpu = (full.cpu_ms() - cpu_before) / rounds
    name = f"scrape of /metrics, {INSTANCES} instances"
    return Measured(
        [
            row(f"{name}, p50", "ms", found, budget=at_most(SCRAPE_MS)),
            row(f"{name}, slowest", "ms", found, stat=max, budget=at_most(SCRAPE_MS)),
            row(f"{name}: CPU of the worker", "ms", [cpu]),
        ]
    )


async def scrape() -> str:
    reader, writer = await asyncio.open_connection(*LISTEN.split(":"))
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return text


async def populate(host: LiveHost) -> None:
    """Stopped instances in the journal; no worker runs."""
    limits = host.settings.limits
    journal = await Journal.open(
        f"{host.settings.paths.state}/journal.db",
        subjects=host.subjects,
        boot_id=HostFacts().boot_id(),
        lane_depth=limits.lane_depth,
        tenant_depth=limits.tenant_depth,
        host_depth=limits.host_depth,
    )
    try:
        for number in range(INSTANCES):
            ref = InstanceRef(f"t-{number // PER_TENANT}", "web", f"i-{number % PER_TENANT}")
            record = InstanceRecord(ref=ref, status=Status.STOPPED, since_ms=1, launch=1)
            await journal.records.put_instance(record)
    finally:
        await journal.close()
