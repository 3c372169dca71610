"""The running bare script, and a tenant with instances for it on the measured host."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from bench.bench_host import BenchHost
from bench.raw import bare
from bench.raw.bare_instance import BareInstance, BareInstances
from schemas.requests import SetupNetwork, StartInstance, StopInstance

TIMEOUT_S = 60.0
DATA_DISK_MIB = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """One job; `at` is when it ended, CLOCK_MONOTONIC. `cpu_ms` is of the script's process, without
    jailer and VMM, with what the job made before."""

    took_ms: float
    at: float
    phases_ms: dict[str, float]
    cpu_ms: float


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
        await script._line()
        return script

    async def run(self, job: dict[str, Any]) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        answer = await self._line()
        phases = {name: seconds * 1e3 for name, seconds in answer["phases"].items()}
        return Answer(answer["took_s"] * 1e3, answer["at"], phases, answer["cpu_s"] * 1e3)

    async def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            answer: dict[str, Any] = json.loads(await self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"bare script failed: {answer['error']}")
        return answer

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


@asynccontextmanager
async def stage(bench: BenchHost, mem_mib: int) -> AsyncGenerator[BareInstances]:
    """A tenant with its network up and its revision imported; `i-0` was started and stopped."""
    seeded = bench.seed("i-0", mem_mib=mem_mib, data_disk_mib=DATA_DISK_MIB, offset=3)
    await bench.sender.send(SetupNetwork("acme", seeded.net))
    await bench.sender.send(StartInstance("acme", "web", "i-0"))
    await bench.sender.send(StopInstance("acme", "web", "i-0"))
    assert seeded.revision is not None
    with BareInstances(
        bench.host, seeded.net, seeded.revision, mem_mib=mem_mib, data_disk_mib=DATA_DISK_MIB
    ) as instances:
        try:
            yield instances
        finally:
            for instance in instances.all:
                await instance.clear()


async def take_snapshot(instance: BareInstance, script: Script) -> None:
    """Start and sleep once; the files serve every wake that does not discard them."""
    await instance.make(wakes=False)
    try:
        await script.run(instance.start_job())
        await script.run(instance.sleep_job())
    finally:
        await instance.clear()
