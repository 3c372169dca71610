"""Many wakes at once, by hostd and by as many bare scripts; the memory files are in memory."""

import asyncio
import os
import time
from contextlib import AsyncExitStack

from bench.bench_host import BenchHost
from bench.launches import MEM_MIB
from bench.raw.bare_instance import BareInstance
from bench.raw.script import DATA_DISK_MIB, Script, stage, take_snapshot
from bench.report.budgets import at_most_times
from bench.report.rows import Measured, p99, row
from schemas.requests import SleepInstance, StartInstance, StopInstance, WakeInstance

BURST, BURSTS = 64, 3
RATIO, WARM_RATIO = 1.3, 1.0
AT_ONCE = 8
SETTLE_S = 1.0


async def measure(bench: BenchHost, bursts: int = BURSTS) -> Measured:
    """Without and, on a host that has one, with a warm pool of the burst's size."""
    size = bench.host.settings.vmm.warm_pool
    mine: list[float] = []
    raw: list[float] = []
    cpu_ms: list[float] = []
    async with stage(bench, MEM_MIB) as instances, AsyncExitStack() as stack:
        scripts = [await Script.start() for _ in range(BURST)]
        for script in scripts:
            stack.push_async_callback(script.close)
        names = [("acme", "web", f"b-{number}") for number in range(BURST)]
        for number, (_, _, name) in enumerate(names):
            for each, offset in ((name, 10 + number), (f"bare-{name}", 110 + number)):
                bench.seed(each, mem_mib=MEM_MIB, data_disk_mib=DATA_DISK_MIB, offset=offset)
            instances.add(f"bare-{name}", 110 + number)
        await bench.sender.send_all([StartInstance(*each) for each in names], AT_ONCE)
        for script, instance in zip(scripts, instances.all, strict=True):
            await take_snapshot(instance, script)
        for number in range(bursts):
            for hostd in (bool(number % 2), not number % 2):
                if hostd:
                    await hostd_burst(bench, names, mine, cpu_ms)
                else:
                    await bare_burst(instances.all, scripts, raw)
                await asyncio.sleep(SETTLE_S)
        await bench.sender.send_all([StopInstance(*each) for each in names], AT_ONCE)
    name = f"burst of {BURST} wakes" + (f", warm pool of {size}" if size else "")
    budget = at_most_times(WARM_RATIO if size else RATIO)
    return Measured(
        [
            row(f"{name}, p99", "ms", mine, raw, stat=p99, budget=budget),
            row(f"{name}, p50", "ms", mine, raw),
            row(f"{name}: CPU of the worker per wake", "ms", cpu_ms),
        ]
    )


async def hostd_burst(
    bench: BenchHost, names: list[tuple[str, str, str]], times: list[float], cpu_ms: list[float]
) -> None:
    await bench.sender.send_all([SleepInstance(*each, force=False) for each in names], AT_ONCE)
    await bench.until_warm()
    await asyncio.sleep(SETTLE_S)
    await bench.quiet()
    before_ms = bench.cpu_ms()
    began = time.monotonic()

    async def one(wake: WakeInstance) -> None:
        await bench.sender.send(wake)
        times.append((time.monotonic() - began) * 1e3)

    await asyncio.gather(*(one(WakeInstance(*each)) for each in names))
    cpu_ms.append((bench.cpu_ms() - before_ms) / len(names))


async def bare_burst(
    instances: list[BareInstance], scripts: list[Script], times: list[float]
) -> None:
    for instance in instances:
        await instance.make(wakes=True)
    await asyncio.sleep(SETTLE_S)
    began = time.monotonic()
    try:
        answers = await asyncio.gather(
            *(s.run(p.wake_job()) for s, p in zip(scripts, instances, strict=True))
        )
        times += [(answer.at - began) * 1e3 for answer in answers]
    finally:
        for instance in instances:
            await instance.clear()
    await asyncio.to_thread(os.sync)
