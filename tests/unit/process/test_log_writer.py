"""Logging never raises and never blocks, whatever happens to stdout; what is lost is counted."""

import fcntl
import json
import os
import sys
from asyncio import create_subprocess_exec, timeout
from asyncio.subprocess import PIPE
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from worker.log_writer import QUEUE_LINES, LogWriter
from worker.logs import BURST, LogLimit

LINES = 3 * QUEUE_LINES
PROGRAM = f"""
import asyncio, logging, sys
from worker import logs
from worker.log_writer import LogWriter, open_standard_descriptors

async def work():
    log = logs.log
    for n in range({LINES}):
        log.info("command.done", n=n, text="x" * 200)
        if not n % 1000:
            await asyncio.sleep(0)
    log.warning("odd.value", cycle=loop, deep=deep, lone="\\ud800", key={{(1, 2): 3}})
    logging.getLogger("asyncio").error("socket.accept() out of system resource")
    await asyncio.get_running_loop().run_in_executor(None, lambda: None)

loop = []
loop.append(loop)
deep = []
for _ in range(100_000):
    deep = [deep]
open_standard_descriptors()
writer = LogWriter(1)
logs.configure("info", writer=writer)
asyncio.run(work())
writer.close(0.2)
print(logs.dropped(), file=sys.stderr)
"""


@contextmanager
def closed_pipe() -> Generator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def full_pipe() -> Generator[int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * 4096)
    yield writer
    os.close(writer)
    os.close(reader)


@contextmanager
def full_nonblocking_pipe() -> Generator[int]:
    with full_pipe() as writer:
        os.set_blocking(writer, False)
        yield writer


@contextmanager
def full_disk() -> Generator[int]:
    fd = os.open("/dev/full", os.O_WRONLY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("stdout", [closed_pipe, full_pipe, full_nonblocking_pipe, full_disk])
async def test_a_stdout_that_takes_nothing_costs_lines_and_nothing_else(
    stdout: Callable[[], Any],
) -> None:
    with stdout() as fd:
        process = await create_subprocess_exec(
            sys.executable, "-c", PROGRAM, stdout=fd, stderr=PIPE
        )
        async with timeout(60):
            _, errors = await process.communicate()

    assert process.returncode == 0, errors
    assert int(errors) >= LINES - QUEUE_LINES


async def test_a_stdout_that_is_closed_at_start_is_not_another_file(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    program = PROGRAM.replace(
        "open_standard_descriptors()\n",
        f"open_standard_descriptors()\nvictim = open({str(victim)!r}, 'wb')\n",
    )
    process = await create_subprocess_exec(
        "/bin/sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, program, stderr=PIPE
    )
    async with timeout(60):
        await process.communicate()

    assert (process.returncode, victim.read_bytes()) == (0, b"")


async def test_a_stdout_that_works_gets_every_line_in_order(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as file:
        process = await create_subprocess_exec(
            sys.executable,
            "-c",
            PROGRAM.replace(str(LINES), "2000").replace("close(0.2)", "close(30)"),
            stdout=file,
            stderr=PIPE,
        )
        async with timeout(60):
            _, errors = await process.communicate()

    lines = [json.loads(line) for line in (tmp_path / "log").read_bytes().splitlines()]
    assert (process.returncode, int(errors)) == (0, 0)
    assert [line["n"] for line in lines[:-2]] == list(range(2000))
    assert [line["event"] for line in lines[-2:]] == ["odd.value", "library.logged"]
    assert "out of system resource" in lines[-1]["text"]


def test_a_line_after_one_that_was_cut_is_whole(tmp_path: Path) -> None:
    reader, fd = os.pipe()
    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 4096)
    writer = LogWriter(fd)
    writer.msg("a" * 6000)  # more than the pipe holds: the first write is partial
    os.close(reader)
    writer.close(10)
    os.close(fd)

    assert writer.dropped == 1


def test_repeated_warnings_are_limited_per_event_and_say_how_many_were_left_out() -> None:
    now = [0.0]
    limit = LogLimit(monotonic_s=lambda: now[0])

    def passes(event: str, level: str = "warning") -> dict[str, Any] | None:
        try:
            return dict(limit(None, "", {"event": event, "level": level}))
        except structlog.DropEvent:
            return None

    first = [passes("bus.failed") for _ in range(BURST + 50)]
    other = passes("lease.lost")
    info = [passes("command.done", "info") for _ in range(10 * BURST)]
    now[0] = 1.0
    later = passes("bus.failed")

    assert [each is not None for each in first] == [True] * BURST + [False] * 50
    assert (other is not None, all(info)) == (True, True)
    assert later is not None
    assert (later["suppressed"], limit.suppressed) == (50, 50)


async def test_the_workers_log_limits_repeated_warnings_and_counts_them_as_dropped() -> None:
    program = f"""
import sys
from worker import logs
from worker.log_writer import LogWriter

writer = LogWriter(1)
logs.configure("info", writer=writer)
for _ in range({3 * BURST}):
    logs.log.warning("fault.repeated")
writer.close()
print(logs.dropped(), file=sys.stderr)
"""
    worker = await create_subprocess_exec(sys.executable, "-c", program, stdout=PIPE, stderr=PIPE)
    async with timeout(60):
        written, dropped = await worker.communicate()

    lines = [json.loads(line)["event"] for line in written.splitlines()]
    assert 0 < int(dropped) < 3 * BURST
    assert lines == ["fault.repeated"] * (3 * BURST - int(dropped))
