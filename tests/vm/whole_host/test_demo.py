"""`hostd demo` with the mini guest, as a process: nothing is left, also when interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handlers.host.vmm.cgroups import find_mount
from tests.guests.cache import BUILD, REPOSITORY

Demo = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    """Start it with `tmp_path` for its files; killed after the test, should it still run."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        command = ["demo", "--guest", "mini", "--build", str(BUILD), *options]
        process = subprocess.Popen(
            [sys.executable, "-c", "from worker.cli.main import main; main()", *command],
            env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def left_of(pid: int, directory: Path) -> list[str]:
    """Files, cgroups, mounts and processes of the demo with this pid."""
    cgroup = Path(find_mount(), f"hostd-demo-{pid}")
    mounts = [
        line for line in Path("/proc/mounts").read_text().splitlines() if str(directory) in line
    ]
    processes: list[str] = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"demo-{pid}\0".encode() in environ.read_bytes():
                processes.append(environ.parent.name)
        except OSError:
            continue
    return [*map(str, directory.iterdir()), *([str(cgroup)] * cgroup.exists()), *mounts, *processes]


def test_the_demo_reports_every_step_and_leaves_nothing(demo: Demo, tmp_path: Path) -> None:
    process = demo("--json")
    out, err = process.communicate(timeout=90)

    assert process.returncode == 0, err
    summary = json.loads(out)
    facts = {step["what"]: step["facts"] for step in summary["steps"]}
    assert "same boot id" in facts["guest state"]
    assert "processes 1, taps 1, bridges 1" in facts["hostd owns"]
    assert "unchanged" in facts["inventory"]
    assert left_of(process.pid, tmp_path) == []
    picture = (REPOSITORY / "docs/images/demo.svg").read_text(encoding="utf-8")
    shown = re.findall(r'<tspan class="name">  (\S.*?) *</tspan>', picture)
    assert shown == list(facts), "take it again: tests/demo_picture.py"


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing(
    demo: Demo, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    process = demo()
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("  hostd owns"))
    # At once, while it sleeps: a look at all processes may take longer than the rest of the demo.
    process.send_signal(number)
    cgroup = Path(find_mount(), f"hostd-demo-{process.pid}")
    running = [cgroup.exists(), *tmp_path.iterdir()]
    process.communicate(timeout=60)

    assert running[0]
    assert len(running) > 1
    assert process.returncode == exit_code
    assert left_of(process.pid, tmp_path) == []
