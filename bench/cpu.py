"""CPU time and memory of processes, to the nanosecond: /proc's ticks of 10 ms are too coarse.

Source: clock_getcpuclockid(3): the clock of a process counts all its threads, also those that have
ended, and none of its children.
"""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from handlers.host.linux.procfs import read_mounts

PAGE_KIB = os.sysconf("SC_PAGESIZE") // 1024
CPUCLOCK_SCHED = 2
LOOK_S, QUIET_SHARE, QUIET_LOOKS, PATIENCE_S = 0.05, 0.03, 2, 10.0


def cpu_s(*pids: int) -> float:
    """User and system time that these processes have used, without their children."""
    return sum(time.clock_gettime_ns((~pid << 3) | CPUCLOCK_SCHED) for pid in pids) / 1e9


def kernel_s(*pids: int) -> float:
    """The system time among it, in ticks of 10 ms: only a sum over many calls means something."""
    ticks = sum(
        int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[12])
        for pid in pids
    )
    return ticks / os.sysconf("SC_CLK_TCK")


def own_processes(pid: int) -> list[int]:
    """A worker and the processes of its own program below it: no jailer, no VMM.

    Helper processes live as long as the worker; so ask once, when it is ready.
    """
    program = os.readlink(f"/proc/{pid}/exe")
    found: list[int] = []
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        try:
            if os.readlink(f"/proc/{each}/exe") != program:
                continue
            children = Path(f"/proc/{each}/task").glob("*/children")
            waiting += [int(child) for file in children for child in file.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.append(each)
    return found


def rss_kib(*pids: int) -> int:
    return sum(
        int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_KIB
        for pid in pids
    )


async def quiet(*pids: int, patience_s: float = PATIENCE_S) -> None:
    """Wait until the processes use next to no CPU, e.g. the work after a reply is done.

    Returns also when `patience_s` is over: a process that is never quiet is measured as it is.
    """
    until = time.monotonic() + patience_s
    looks, before = 0, cpu_s(*pids)
    while looks < QUIET_LOOKS and time.monotonic() < until:
        await asyncio.sleep(LOOK_S)
        now = cpu_s(*pids)
        looks = looks + 1 if now - before < LOOK_S * QUIET_SHARE else 0
        before = now


@contextmanager
def stopped(pids: Iterable[int]) -> Generator[None]:
    """Inside the `with`, these processes do not run: as if the machine had none of them."""
    there: list[int] = []
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                there.append(pid)
        yield
    finally:
        for pid in there:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def in_the_background(pids: list[int]) -> Generator[None]:
    """Give these processes only the CPU time that nobody else wants, where a cgroup can do that.

    The guests' clocks tick, and so many of them take both cores of a small machine; then all that
    is measured is who gets them. So they are as on a host that has a core to spare for hostd.
    """
    groups = (each.mount_point for each in read_mounts() if each.fs_type == "cgroup")
    top = next(
        (
            each
            for each in groups
            if Path(each, "cgroup.procs").exists() and Path(each, "cpu.shares").exists()
        ),
        None,
    )
    if top is None:
        yield
        return
    group = Path(tempfile.mkdtemp(prefix="hostd-bench-", dir=top))
    try:
        idle = Path(group, "cpu.idle")
        # With a small share they still get the core for a slice when another process wakes up.
        (idle if idle.exists() else Path(group, "cpu.shares")).write_text(
            "1" if idle.exists() else "2"
        )
        for pid in pids:
            Path(group, "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for left in Path(group, "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                Path(top, "cgroup.procs").write_text(left)
        group.rmdir()
