"""Executing a program without blocking the event loop: environment, exit, cancellation."""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.host.vmm import spawn

PYTHON = (sys.executable, "-I", "-S", "-c")
LIBC_INTERNAL = 1 << 31 | 1 << 32
"""Signals 32 and 33, which glibc's posix_spawn leaves ignored: no program sees them."""


@pytest.fixture
def output() -> Iterator[int]:
    fd = os.memfd_create("output")
    yield fd
    os.close(fd)


def said(output: int) -> str:
    return os.pread(output, 65536, 0).decode()


@pytest.mark.parametrize(
    ("program", "code"),
    [("pass", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)],
)
async def test_the_exit_code_is_returned_and_negative_for_a_signal(
    output: int, program: str, code: int
) -> None:
    assert await spawn.run([*PYTHON, program], output) == code


async def test_an_argument_that_is_no_text_is_passed_as_it_is(output: int) -> None:
    argument = b"\xe9-\xc3\xa9"

    await spawn.run(["/bin/echo", os.fsdecode(argument)], output)

    assert os.pread(output, 100, 0) == argument + b"\n"


async def test_both_outputs_are_kept_and_stdin_is_empty(output: int) -> None:
    program = "import sys; print(repr(sys.stdin.read()), flush=True); print('e', file=sys.stderr)"

    await spawn.run([*PYTHON, program], output)

    assert said(output) == "''\ne\n"


async def test_neither_descriptors_nor_ignored_signals_are_inherited(output: int) -> None:
    canary = os.dup(output)
    os.set_inheritable(canary, True)
    try:
        await spawn.run(["/bin/cat", "/proc/self/status"], output)
        status = dict(line.split(":\t") for line in said(output).splitlines() if ":\t" in line)
        os.ftruncate(output, 0)
        os.lseek(output, 0, os.SEEK_SET)
        await spawn.run(["/bin/ls", "/proc/self/fd"], output)
        descriptors = said(output)
    finally:
        os.close(canary)

    assert int(status["SigIgn"], 16) & ~LIBC_INTERNAL == 0
    assert int(status["SigBlk"], 16) == 0
    assert descriptors.split() == ["0", "1", "2", "3"]


async def test_the_environment_is_empty(output: int) -> None:
    await spawn.run(["/bin/cat", "/proc/self/environ"], output)

    assert said(output) == ""


async def test_a_missing_program_is_an_os_error(output: int) -> None:
    with pytest.raises(FileNotFoundError):
        await spawn.run(["/nope"], output)


async def test_a_cancelled_run_kills_and_reaps_the_program(output: int) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    running = asyncio.create_task(spawn.run([*PYTHON, program], output))
    async with asyncio.timeout(10):
        while not said(output).endswith("\n"):
            await asyncio.sleep(0.001)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert not Path(f"/proc/{int(said(output))}").exists()


async def test_a_run_cancelled_during_the_spawn_leaves_no_child(output: int) -> None:
    for turns in range(20):
        running = asyncio.create_task(spawn.run(["/bin/sleep", "60"], output))
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


async def test_the_event_loop_runs_meanwhile(output: int) -> None:
    turns = 0
    running = asyncio.create_task(spawn.run(["/bin/sleep", "0.1"], output))
    while not running.done():
        await asyncio.sleep(0.001)
        turns += 1

    assert turns > 10
    assert running.result() == 0
