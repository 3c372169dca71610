"""What must not grow: the worker's memory, descriptors, threads, tasks; the journal's files."""

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from tests.soak.faults import Faults
from worker.cli.control_client import ControlClient

EVERY_S: Final = 2.0
SETTLED_S: Final = 8.0  # of a worker's life before its first sample
# How much more the last third of the samples may have than the first: of it, and in all.
SLACK: Final = {
    "rss_kib": (0.15, 8_192),
    "descriptors": (0, 16),
    "threads": (0, 6),
    "tasks": (0, 24),
}
JOURNAL_BYTES_PER_COMMAND: Final = 8_192
WAL_BYTES: Final = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """`at_s` since the begin; the journal's bytes without its log; by then `commands` in all;
    `kinds` of the descriptors."""

    at_s: float
    rss_kib: int
    descriptors: int
    threads: int
    tasks: int
    journal_bytes: int
    wal_bytes: int
    commands: int
    kinds: dict[str, int]


@dataclass
class Gauges:
    """Samples of workers that have settled."""

    faults: Faults
    samples: list[Sample] = field(default_factory=list[Sample])

    async def run(self, count: Sized) -> None:
        """Until cancelled; `count` holds the commands so far."""
        while True:
            await asyncio.sleep(EVERY_S)
            age_s = time.monotonic() - self.faults.worker_since
            worker = self.faults.host.worker
            if not self.faults.worker_up.is_set() or worker is None or age_s < SETTLED_S:
                continue
            with contextlib.suppress(Exception):  # it was killed meanwhile
                self.samples.append(await asyncio.to_thread(self.sample, worker.pid, len(count)))

    def sample(self, pid: int, commands: int) -> Sample:
        facts = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
        )
        settings = self.faults.host.settings
        state = Path(settings.paths.state)
        return Sample(
            at_s=round(time.monotonic() - self.faults.began, 1),
            rss_kib=int(facts["VmRSS"].split()[0]),
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=int(facts["Threads"]),
            tasks=ControlClient(settings).get("/v1/dump")["tasks"]["count"],
            journal_bytes=(state / "journal.db").stat().st_size,
            wal_bytes=(state / "journal.db-wal").stat().st_size,
            commands=commands,
            kinds=kinds_of(pid),
        )

    def growth(self) -> list[str]:
        """What grew beyond its slack; a sentence each."""
        third = len(self.samples) // 3
        if third < 3:
            return [f"only {len(self.samples)} samples: too few to tell what grows"]
        first, last = self.samples[:third], self.samples[-third:]
        found: list[str] = []
        for name, (share, extra) in SLACK.items():
            before, after = (median(asdict(s)[name] for s in part) for part in (first, last))
            if after > before * (1 + share) + extra:
                found.append(f"{name} grew from {before:g} to {after:g}")
        commands = last[-1].commands - first[0].commands
        grown = last[-1].journal_bytes - first[0].journal_bytes
        if grown > commands * JOURNAL_BYTES_PER_COMMAND + 2**20:
            found.append(f"the journal grew by {grown} bytes with {commands} commands")
        if (wal := max(s.wal_bytes for s in self.samples)) > WAL_BYTES:
            found.append(f"the journal's log grew to {wal} bytes")
        return found


def kinds_of(pid: int) -> dict[str, int]:
    """The descriptors of a process by what they are: socket, pidfd, files by their first names."""
    found: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            found[
                target.split(":")[0] if target[0] != "/" else "/".join(target.split("/")[:3])
            ] += 1
    return dict(found)
