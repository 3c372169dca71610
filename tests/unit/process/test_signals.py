"""Signals of a worker process: each one that can be caught is caught, none ends it by itself."""

import signal
import subprocess
import sys
from signal import Signals

import pytest

from worker.signals import DEFAULT, DUMP, FAULTS, RELOAD, STOP, ignored, name_of

PROCESS = """
import asyncio, sys
from worker import logs
from worker.signals import WorkerSignals

async def main():
    logs.configure("info")
    signals = WorkerSignals()
    signals.install()
    print("ready", flush=True)
    reload = asyncio.create_task(signals.reload.wait())
    stop = asyncio.create_task(signals.stop.wait())
    await asyncio.wait([reload, stop], return_when=asyncio.FIRST_COMPLETED)
    print("reload" if reload.done() else "stop", flush=True)
    reload.cancel()
    stop.cancel()

asyncio.run(main())
"""


def test_every_signal_of_the_system_is_in_one_class() -> None:
    classes = (DEFAULT, STOP, {RELOAD}, {DUMP}, ignored())

    assert sum(len(each) for each in classes) == len(signal.valid_signals())
    assert set().union(*classes) == signal.valid_signals()
    assert {
        Signals.SIGKILL, Signals.SIGSTOP,  # cannot be caught
        Signals.SIGCHLD, Signals.SIGCONT, Signals.SIGURG, Signals.SIGWINCH,  # end nothing
        Signals.SIGPIPE, Signals.SIGXFSZ,  # ignored by Python
    } == DEFAULT - FAULTS  # fmt: skip


@pytest.mark.parametrize("number", sorted(ignored()), ids=name_of)
def test_a_signal_that_says_nothing_to_a_worker_is_logged_and_ignored(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", PROCESS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

        process.send_signal(number)
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()

    assert b'"event":"signal.ignored"' in line
    assert f'"signal":"{name_of(number)}"'.encode() in line
    assert (rest, process.returncode) == (b"stop\n", 0)


@pytest.mark.parametrize(
    ("number", "effect"), [(Signals.SIGHUP, b"reload"), (Signals.SIGINT, b"stop")]
)
def test_a_signal_with_a_meaning_has_it(number: int, effect: bytes) -> None:
    with subprocess.Popen([sys.executable, "-c", PROCESS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

        process.send_signal(number)

        assert process.stdout.read() == effect + b"\n"
    assert process.returncode == 0
