"""The bare script measures what hostd is compared with: the same waits, the same beginning."""

import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.raw import bare
from handlers.host.vmm import guest_agent

REFUSED = 40


@contextmanager
def booting_guest(path: Path, refused: int) -> Generator[None]:
    """A VMM's vsock socket that closes so many connections before its guest's agent answers."""

    def serve() -> None:
        for _each in range(refused):
            listener.accept()[0].close()
        stream, _ = listener.accept()
        with stream:
            stream.recv(4096)
            stream.sendall(b"OK 1073741824\n")
            stream.recv(4096)
            stream.sendall(b'\0\0\0\6"Pong"')

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        serving = threading.Thread(target=serve)
        serving.start()
        yield
        serving.join()


@pytest.fixture
def slept_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the script would have slept."""
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=slept.append)
    monkeypatch.setattr(bare, "time", clock)
    return slept


def test_it_asks_a_booting_guest_as_often_as_hostd(tmp_path: Path, slept_s: list[float]) -> None:
    with booting_guest(tmp_path / "v.sock", REFUSED):
        bare._ask(tmp_path / "v.sock", "Ping")

    growth = guest_agent.WAIT_GROWTH
    hostds = [guest_agent.FIRST_WAIT_S * growth**number for number in range(REFUSED)]
    assert slept_s == pytest.approx([min(each, guest_agent.LAST_WAIT_S) for each in hostds])


def test_it_looks_for_a_late_api_ever_less_often(
    tmp_path: Path, slept_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bare, "LIMIT_S", 0.1)
    with pytest.raises(FileNotFoundError):
        bare._connected(tmp_path / "api.sock")

    steady = list(itertools.takewhile(lambda each: each == bare.POLL_S, slept_s))
    assert sum(steady) == pytest.approx(bare.STEADY_S, abs=2 * bare.POLL_S)
    assert slept_s[-1] == bare.LAST_WAIT_S


def test_a_duration_begins_some_time_after_what_the_job_had_to_make(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    at: dict[str, float] = {}

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def make(_: object) -> None:
        at["made"] = clock[0]

    def run(_: object) -> dict[str, float]:
        at["run"] = clock[0]
        clock[0] += 1
        return {}

    script = SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep, process_time=lambda: 0.0)
    monkeypatch.setattr(bare, "time", script)
    monkeypatch.setattr(bare, "make", make)
    monkeypatch.setattr(bare, "run", run)
    monkeypatch.setattr(sys, "stdin", ['{"make": {}}\n'])
    bare.main()

    assert at["run"] - at["made"] == bare.SETTLE_S
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["took_s"] == 1
