"""A real host with many networks and running guests: its commands, and a restart after kill -9."""

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field

from bench.bench_host import BenchHost
from bench.cpu import in_the_background
from bench.report.budgets import at_most, within_percent
from bench.report.rows import Measured, Row, row
from bench.sender import Sent
from schemas.requests import (
    Request,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    WakeInstance,
)

ROUNDS, RESTARTS = 12, 3
TENANTS, GUESTS, PER_TENANT = 500, 200, 4
FIRST_NET_ID, CHANGING_NET_ID = 100, 60
MEM_MIB, AT_ONCE = 8, 4
SETTLE_S = 0.1
PERCENT = 10.0
RECOVERY_MS = 2000.0
NAMES, OTHER = ("acme", "web", "i-0"), ("acme", "web", "i-1")


@dataclass
class Costs:
    """By command: milliseconds until the reply, and of the worker's CPU until it was quiet."""

    took_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


async def measure(bench: BenchHost, rounds: int = ROUNDS) -> Measured:
    """The same commands first with one other guest, then with all; the worker restarts between."""
    seeded = bench.seed("i-0", mem_mib=MEM_MIB, data_disk_mib=0, offset=10)
    bench.seed("i-1", mem_mib=MEM_MIB, data_disk_mib=0, offset=11)
    changing = bench.seed("i-0", tenant="changing", net_id=CHANGING_NET_ID)
    await bench.sender.send(SetupNetwork("acme", seeded.net))
    await bench.sender.send(StartInstance(*OTHER))
    cycle: dict[str, Request] = {
        "no-op": StartInstance(*OTHER),
        "SetupNetwork": SetupNetwork("changing", changing.net),
        "StartInstance": StartInstance(*NAMES),
        "SleepInstance": SleepInstance(*NAMES, force=False),
        "WakeInstance": WakeInstance(*NAMES),
        "StopInstance": StopInstance(*NAMES),
        "TeardownNetwork": TeardownNetwork("changing", changing.net),
    }
    few = await costs(bench, cycle, rounds)
    await crowd(bench)
    with in_the_background(bench.host.vm_pids()):
        many = await costs(bench, cycle, rounds)
        restarted = await restarts(bench)
    rows: list[Row] = []
    budget = within_percent(PERCENT)
    against = f"{GUESTS} guests, {TENANTS} networks against 1"
    for name in cycle:
        rows += [
            row(f"{name}, {against}, p50", "ms", many.took_ms[name], few.took_ms[name],
                budget=budget),
            row(f"{name}, {against}: CPU of the worker", "ms", many.cpu_ms[name],
                few.cpu_ms[name], budget=budget),
        ]  # fmt: skip
    return Measured([*rows, restarted])


async def costs(bench: BenchHost, cycle: dict[str, Request], rounds: int) -> Costs:
    found = Costs()
    for number in range(rounds + 1):
        for name, request in cycle.items():
            await asyncio.sleep(SETTLE_S)
            await bench.quiet()
            before_ms = bench.cpu_ms()
            sent: Sent = await bench.sender.send(request)
            await bench.quiet()
            if number:  # the first one is a warm-up
                found.took_ms[name].append(sent.took_ms)
                found.cpu_ms[name].append(bench.cpu_ms() - before_ms)
    return found


async def crowd(bench: BenchHost) -> None:
    setups: list[Request] = []
    starts: list[Request] = []
    for number in range(TENANTS):
        tenant = f"t-{number}"
        for guest in range(PER_TENANT if len(starts) < GUESTS else 1):
            seeded = bench.seed(
                f"i-{guest}",
                tenant=tenant,
                net_id=FIRST_NET_ID + number,
                mem_mib=MEM_MIB,
                data_disk_mib=0,
                offset=10 + guest,
            )
            if guest == 0:
                setups.append(SetupNetwork(tenant, seeded.net))
            if len(starts) < GUESTS:
                starts.append(StartInstance(tenant, "web", f"i-{guest}"))
    await bench.sender.send_all(setups, AT_ONCE)
    await bench.sender.send_all(starts, AT_ONCE)


async def restarts(bench: BenchHost) -> Row:
    """From the start of a process until the reply to a command sent at once; no VM is touched."""
    found: list[float] = []
    for _ in range(RESTARTS):
        before = bench.host.vm_pids()
        await bench.host.kill_worker()
        began = time.monotonic()
        await bench.host.start_worker(ready=False)
        await bench.sender.send(StartInstance(*OTHER))
        found.append((time.monotonic() - began) * 1e3)
        if sorted(bench.host.vm_pids()) != sorted(before):
            raise RuntimeError("VMs were touched")
        await asyncio.sleep(1)
    return row(
        f"kill -9 with {GUESTS} guests and {TENANTS} networks: start to first reply",
        "ms",
        found,
        budget=at_most(RECOVERY_MS),
    )
