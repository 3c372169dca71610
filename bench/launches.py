"""Start, Sleep, Wake and Stop of one instance against the bare script, each timed end to end.

hostd from the sender's publish to its reply; the script, once all that a launch needs is made, from
its first call to the end of its last. Both go through the same cycle; rounds alternate, and so does
which of the two goes first.
"""

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from bench.bench_host import BenchHost
from bench.raw.bare_instance import BareInstance
from bench.raw.script import DATA_DISK_MIB, Answer, Script, stage
from bench.report.budgets import Budget, at_most, at_most_more, at_most_times, below_raw
from bench.report.rows import Measured, Row, Samples, floor, p99, row
from bench.sender import Sent
from schemas.requests import Request, SleepInstance, StartInstance, StopInstance, WakeInstance

ROUNDS, LARGE_ROUNDS = 25, 8
MEM_MIB, LARGE_MIB = 32, 512
SETTLE_S = 0.1
NAMES = ("acme", "web", "i-0")
CYCLE: dict[str, Request] = {
    "start": StartInstance(*NAMES),
    "sleep": SleepInstance(*NAMES, force=False),
    "wake": WakeInstance(*NAMES),
    "stop": StopInstance(*NAMES),
}
BUDGETS = {
    "start": at_most_more(10, "ms"),
    "sleep": at_most_times(1.2),
    "wake": at_most_more(8, "ms"),
    "stop": at_most_times(1.2),
}
WORKER_CPU_MS = 10.0
FLOORS = (
    ("the jailer, spawn to exit", "start", ("jailer",)),
    ("jailer and VMM, spawn to listening API", "start", ("jailer", "api")),
    ("guest boots until its agent answers", "start", ("PUT /actions", "agent")),
    ("VMM loads a snapshot", "wake", ("PUT /snapshot/load",)),
    ("guest resumes until its agent answers", "wake", ("PATCH /vm", "agent")),
    ("VMM writes memory and state", "sleep", ("PUT /snapshot/create",)),
    ("fsync of memory and state", "sleep", ("sync",)),
    ("VMM ends after SIGKILL", "sleep", ("exit",)),
    ("guest ends after Ctrl-Alt-Del", "stop", ("PUT /actions", "exit")),
    ("kernel deletes a TAP", "stop", ("tap",)),
    ("kernel removes a cgroup", "stop", ("cgroup",)),
)


@dataclass
class Times:
    """By operation: hostd's replies and the CPU time of its worker; the script's answers."""

    hostd: defaultdict[str, list[Sent]] = field(default_factory=lambda: defaultdict(list))
    cpu_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    kernel_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    bare: defaultdict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))

    def took_ms(self, what: str) -> list[float]:
        return [sent.took_ms for sent in self.hostd[what]]

    def bare_ms(self, what: str) -> list[float]:
        return [answer.took_ms for answer in self.bare[what]]

    def bare_cpu_ms(self, what: str) -> list[float]:
        return [answer.cpu_ms for answer in self.bare[what]]

    def phases_ms(self, what: str, *names: str) -> list[float]:
        return [sum(each.phases_ms[name] for name in names) for each in self.bare[what]]


async def measure(bench: BenchHost, rounds: int = ROUNDS) -> Measured:
    """All four, with the floors of the script's own phases."""
    times = await cycles(bench, MEM_MIB, rounds)
    rows: list[Row] = []
    for what, budget in BUDGETS.items():
        rows += rows_of(times, what, f"{what.capitalize()}Instance, mini guest", budget)
    for what in BUDGETS:
        name = f"{what.capitalize()}Instance: CPU of the worker"
        limit = at_most(WORKER_CPU_MS) if what in ("start", "wake") else None
        rows.append(row(name, "ms", times.cpu_ms[what], times.bare_cpu_ms(what), budget=limit))
    for what in ("start", "wake"):
        name = f"the kernel's part of that CPU, {what.capitalize()}Instance, mean"
        rows.append(floor(name, "ms", [fmean(times.kernel_ms[what])]))
    for name, what, phases in FLOORS:
        rows.append(floor(name, "ms", times.phases_ms(what, *phases)))
    return Measured(rows)


async def measure_warm(bench: BenchHost, rounds: int = ROUNDS) -> Measured:
    """The same on a host with a warm pool, which is full before each Start and Wake."""
    times = await cycles(bench, MEM_MIB, rounds)
    rows: list[Row] = []
    for what in ("start", "wake"):
        name = f"{what.capitalize()}Instance, mini guest, warm pool"
        rows += rows_of(times, what, name, below_raw())
        cpu = f"{what.capitalize()}Instance, warm pool: CPU of the worker, refill included"
        rows.append(row(cpu, "ms", times.cpu_ms[what]))
    return Measured(rows)


async def measure_large(bench: BenchHost, rounds: int = LARGE_ROUNDS) -> Measured:
    """Wake of a guest with much memory; its file was written just before, so it is in memory."""
    times = await cycles(bench, LARGE_MIB, rounds)
    name = f"WakeInstance, mini guest of {LARGE_MIB} MiB"
    return Measured(
        [
            *rows_of(times, "wake", name, at_most_more(8, "ms")),
            row(
                f"SleepInstance, mini guest of {LARGE_MIB} MiB, p50",
                "ms",
                times.took_ms("sleep"),
                times.bare_ms("sleep"),
            ),
        ]
    )


def rows_of(times: Times, what: str, name: str, budget: Budget) -> list[Row]:
    mine: Samples = times.took_ms(what)
    raw: Samples = times.bare_ms(what)
    return [
        row(f"{name}, p50", "ms", mine, raw, budget=budget),
        row(f"{name}, p99", "ms", mine, raw, stat=p99),
    ]


async def cycles(bench: BenchHost, mem_mib: int, rounds: int) -> Times:
    """Both through the cycle, in turns; the first round is a warm-up: page cache, imports."""
    times = Times()
    async with stage(bench, mem_mib) as instances, AsyncExitStack() as stack:
        bench.seed("bare-0", mem_mib=mem_mib, data_disk_mib=DATA_DISK_MIB, offset=100)
        script = await Script.start()
        stack.push_async_callback(script.close)
        instance = instances.add("bare-0", 100)
        for number in range(rounds + 1):
            for hostd in (bool(number % 2), not number % 2):
                if hostd:
                    await hostd_cycle(bench, times)
                else:
                    await bare_cycle(instance, script, times)
            if number == 0:
                times = Times()
    return times


async def hostd_cycle(bench: BenchHost, times: Times) -> None:
    """CPU time counts until the worker is quiet again: work after a reply is work all the same."""
    for what, request in CYCLE.items():
        await bench.until_warm()
        await asyncio.sleep(SETTLE_S)
        await bench.quiet()
        before_ms, kernel_ms = bench.cpu_ms(), bench.kernel_ms()
        times.hostd[what].append(await bench.sender.send(request))
        await bench.refilled()
        times.cpu_ms[what].append(bench.cpu_ms() - before_ms)
        times.kernel_ms[what].append(bench.kernel_ms() - kernel_ms)


async def bare_cycle(instance: BareInstance, script: Script, times: Times) -> None:
    """What hostd prepares within its own time the script makes before its time begins: jail,
    cgroup, TAP, links. It is in its CPU time."""
    try:
        made = {"make": await instance.making(wakes=False)}
        await bare_job(script, "start", instance.start_job() | made, times)
        await bare_job(script, "sleep", instance.sleep_job(), times)
        await instance.clear()
        made = {"make": await instance.making(wakes=True)}
        await bare_job(script, "wake", instance.wake_job() | made, times)
        await bare_job(script, "stop", instance.stop_job(), times)
    finally:
        await instance.clear()


async def bare_job(script: Script, what: str, job: dict[str, Any], times: Times) -> None:
    await asyncio.sleep(SETTLE_S * 2)
    times.bare[what].append(await script.run(job))
