"""Where the time of one Wake goes: its parts, from the sender's publish to the reply."""

import json
from pathlib import Path

from bench.bench_host import BenchHost
from bench.launches import MEM_MIB, NAMES
from bench.report.rows import Measured, Span, row
from bench.sender import Sent
from bench.traced import TRACE
from schemas.requests import SetupNetwork, SleepInstance, StartInstance, WakeInstance

ROUNDS = 15
LEAST_MS = 0.1


async def measure(bench: BenchHost, rounds: int = ROUNDS) -> Measured:
    """The spans are those of the wake with the median time. Tracing itself costs little."""
    seeded = bench.seed("i-0", mem_mib=MEM_MIB, data_disk_mib=16)
    await bench.sender.send(SetupNetwork("acme", seeded.net))
    await bench.sender.send(StartInstance(*NAMES))
    wakes: list[Sent] = []
    for _ in range(rounds):
        await bench.sender.send(SleepInstance(*NAMES, force=False))
        await bench.quiet()
        wakes.append(await bench.sender.send(WakeInstance(*NAMES)))
        await bench.quiet()
    await bench.host.stop_worker()
    trace = Path(bench.host.settings.paths.run, TRACE).read_text(encoding="ascii")
    median = sorted(wakes, key=lambda sent: sent.took_s)[len(wakes) // 2]
    name = "WakeInstance, mini guest, traced, p50"
    return Measured(
        [row(name, "ms", [sent.took_ms for sent in wakes])], spans_of(median, json.loads(trace))
    )


def spans_of(wake: Sent, trace: list[tuple[str, float, float]]) -> list[Span]:
    """Those within the wake; a name with a dash is part of another, or runs beside it."""
    end_s = wake.began_s + wake.took_s
    return [
        Span(
            name.removeprefix("- "),
            (began - wake.began_s) * 1e3,
            (ended - began) * 1e3,
            indent=int(name.startswith("- ")),
        )
        for name, began, ended in trace
        if wake.began_s <= began < end_s and (ended - began) * 1e3 >= LEAST_MS
    ]
