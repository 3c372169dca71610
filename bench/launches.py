"""StartInstance and WakeInstance against a bare script of the same jailer, API and agent calls.

Both are timed end to end: hostd from the sender's publish to its reply, the script from its first
line to the agent's last answer. Rounds alternate, and so does which of the two goes first.
"""

import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from bench import bare
from bench.bare_instance import BareInstance, BareInstances
from bench.bench_host import BenchHost, Sent
from bench.rows import Row, median, p99, row
from schemas.requests import (
    InstanceRef,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)

ROUNDS = 25
BURST = 32
BURSTS = 3
MEM_MIB = 32
DATA_DISK_MIB = 16
OWN_COST_MS = 10.0
BURST_RATIO = 1.3
SETTLE_S = 0.15
VMM_STEPS = ("vmm", "configure_vm", "start_vm", "wait_agent")
VMM_STEPS_OF_WAKE = ("vmm", "load_snapshot", "resume_vm", "wake_agent", "set_clock")


class Script:
    """One running bare script; a job is one line of its input."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> Self:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", bare.__file__, stdin=-1, stdout=-1
        )
        script = cls(process)
        await script._answer()
        return script

    async def run(self, job: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            answer: dict[str, Any] = json.loads(await self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"bare script failed: {answer['error']}")
        return answer

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


@dataclass
class Times:
    """Durations by operation: hostd's with their replies, the script's in seconds."""

    hostd: defaultdict[str, list[Sent]] = field(default_factory=lambda: defaultdict(list))
    bare: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def took_ms(self, what: str) -> list[float]:
        return [sent.took_s * 1e3 for sent in self.hostd[what]]

    def bare_ms(self, what: str) -> list[float]:
        return [seconds * 1e3 for seconds in self.bare[what]]


@asynccontextmanager
async def stage(bench: BenchHost) -> AsyncGenerator[BareInstances]:
    """A tenant with its network up and its revision imported."""
    seeded = bench.seed("i-0", mem_mib=MEM_MIB, data_disk_mib=DATA_DISK_MIB, offset=3)
    await bench.sender.send(SetupNetwork("acme", seeded.net))
    await bench.sender.send(StartInstance("acme", "web", "i-0"))
    await bench.sender.send(StopInstance("acme", "web", "i-0"))
    assert seeded.revision is not None
    size = {"mem_mib": MEM_MIB, "data_disk_mib": DATA_DISK_MIB}
    with BareInstances(bench.host, seeded.net, seeded.revision, **size) as instances:
        yield instances


async def measure(bench: BenchHost, rounds: int = ROUNDS) -> list[Row]:
    """Start and Wake, one at a time."""
    times = Times()
    async with stage(bench) as instances, AsyncExitStack() as stack:
        bench.seed("bare-0", mem_mib=MEM_MIB, data_disk_mib=DATA_DISK_MIB, offset=100)
        script = await Script.start()
        stack.push_async_callback(script.close)
        instance = instances.add("bare-0", 100)
        await take_snapshot(instance, script)
        for number in range(rounds + 1):
            await both_rounds(bench, instance, script, times, hostd_first=bool(number % 2))
            if number == 0:
                times = Times()  # warm-up: page cache, imports
    return rows_of(times)


async def both_rounds(
    bench: BenchHost, instance: BareInstance, script: Script, times: Times, *, hostd_first: bool
) -> None:
    for hostd in (hostd_first, not hostd_first):
        if hostd:
            await hostd_round(bench, times)
        else:
            await bare_round(instance, script, times)
        await asyncio.sleep(SETTLE_S)


async def hostd_round(bench: BenchHost, times: Times) -> None:
    names = ("acme", "web", "i-0")
    for what, request in (
        ("start", StartInstance(*names)),
        ("sleep", SleepInstance(*names, force=False)),
        ("wake", WakeInstance(*names)),
        ("stop", StopInstance(*names)),
    ):
        times.hostd[what].append(await bench.sender.send(request))
        await asyncio.sleep(SETTLE_S)


async def bare_round(instance: BareInstance, script: Script, times: Times) -> None:
    for what in ("start", "wake"):
        await instance.prepare()
        if what == "wake":
            instance.link_snapshot()
        await asyncio.sleep(SETTLE_S)
        job = instance.start_job() if what == "start" else instance.wake_job()
        try:
            times.bare[what].append((await script.run(job))["took_s"])
        finally:
            await instance.clear()


async def take_snapshot(instance: BareInstance, script: Script) -> None:
    """Start, pause and snapshot once; the files serve every wake of the instance."""
    await instance.prepare()
    try:
        await script.run(instance.start_job())
        await script.run(instance.sleep_job())
        instance.keep_snapshot()
    finally:
        await instance.clear()


def rows_of(times: Times) -> list[Row]:
    rows: list[Row] = []
    for what, steps in (("start", VMM_STEPS), ("wake", VMM_STEPS_OF_WAKE)):
        name = f"{what.capitalize()}Instance, mini guest"
        mine, theirs = median(times.took_ms(what)), median(times.bare_ms(what))
        rows.append(
            row(
                f"{name}, p50",
                "ms",
                mine,
                theirs,
                budget=f"at most {OWN_COST_MS:g} ms more",
                ok=mine - theirs <= OWN_COST_MS,
            )
        )
        rows.append(row(f"{name}, p99", "ms", p99(times.took_ms(what)), p99(times.bare_ms(what))))
        inside = median(sent.step_s(*steps) * 1e3 for sent in times.hostd[what])
        rows.append(row(f"{name}, within jailer, API and agent, p50", "ms", inside, theirs))
    rows.append(row("SleepInstance, mini guest, p50", "ms", median(times.took_ms("sleep"))))
    rows.append(row("StopInstance, mini guest, p50", "ms", median(times.took_ms("stop"))))
    return rows


async def measure_burst(bench: BenchHost, count: int = BURST, bursts: int = BURSTS) -> list[Row]:
    """`count` wakes at once, by hostd and by as many bare scripts; the memory files are warm."""
    mine: list[float] = []
    theirs: list[float] = []
    async with stage(bench) as instances, AsyncExitStack() as stack:
        scripts = [await Script.start() for _ in range(count)]
        for script in scripts:
            stack.push_async_callback(script.close)
        size: dict[str, Any] = {"mem_mib": MEM_MIB, "data_disk_mib": DATA_DISK_MIB}
        refs = [InstanceRef("acme", "web", f"b-{n}") for n in range(count)]
        for number, ref in enumerate(refs):
            bench.seed(ref.instance_id, offset=10 + number, **size)
            await bench.sender.send(StartInstance(ref.tenant_id, ref.pool_id, ref.instance_id))
            bench.seed(f"bare-b-{number}", offset=110 + number, **size)
            instance = instances.add(f"bare-b-{number}", 110 + number)
            await take_snapshot(instance, scripts[number])
        for number in range(bursts):
            for hostd in (bool(number % 2), not number % 2):
                if hostd:
                    await hostd_burst(bench, refs, mine)
                else:
                    await bare_burst(instances.all, scripts, theirs)
                await asyncio.sleep(1)
        for ref in refs:
            await bench.sender.send(StopInstance(ref.tenant_id, ref.pool_id, ref.instance_id))
    name = f"burst of {count} wakes"
    ratio = p99(mine) / p99(theirs)
    return [
        row(
            f"{name}, p99",
            "ms",
            p99(mine),
            p99(theirs),
            budget=f"at most {BURST_RATIO:g}x",
            ok=ratio <= BURST_RATIO,
        ),
        row(f"{name}, p50", "ms", median(mine), median(theirs)),
    ]


async def hostd_burst(bench: BenchHost, refs: list[InstanceRef], times: list[float]) -> None:
    for ref in refs:
        await bench.sender.send(
            SleepInstance(ref.tenant_id, ref.pool_id, ref.instance_id, force=False)
        )
    await asyncio.sleep(1)
    wakes = [WakeInstance(ref.tenant_id, ref.pool_id, ref.instance_id) for ref in refs]
    began = time.monotonic()

    async def one(wake: WakeInstance) -> None:
        await bench.sender.send(wake)
        times.append((time.monotonic() - began) * 1e3)

    await asyncio.gather(*(one(wake) for wake in wakes))


async def bare_burst(
    instances: list[BareInstance], scripts: list[Script], times: list[float]
) -> None:
    for instance in instances:
        await instance.prepare()
        instance.link_snapshot()
    await asyncio.sleep(1)
    began = time.monotonic()
    try:
        answers = await asyncio.gather(
            *(s.run(p.wake_job()) for s, p in zip(scripts, instances, strict=True))
        )
        times += [(answer["at"] - began) * 1e3 for answer in answers]
    finally:
        for instance in instances:
            await instance.clear()
    os.sync()
