"""What an operator installs is accepted by the program that reads it: systemd and Prometheus.

What needs no such program is in tests/unit/repository/test_deploy.py.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_metrics import used

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def run(
    program: str | Path, *args: str | Path, text: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run it in deploy/prometheus; without it, skip here and fail in CI."""
    if shutil.which(program) is None:
        assert not os.environ.get("CI"), f"{program} is missing: run make setup"
        pytest.skip(f"{program} is missing: run make setup")
    command = [program, *args]
    return subprocess.run(
        command,
        cwd=DEPLOY / "prometheus",
        input=text,
        capture_output=True,
        timeout=60,
        check=False,
    )


def promtool(*args: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Debian's, whatever is in PATH."""
    return run(ROOT / "build/tools/promtool", *args, text=text)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "hostd.service").read_text()
    there = tmp_path / "hostd.service"
    there.write_text(unit.replace("/opt/hostd/bin/python", "/bin/true"))

    done = run("systemd-analyze", "verify", "--man=no", there)

    ours = [line for line in done.stderr.splitlines() if b"hostd.service" in line]
    assert (done.returncode, ours) == (0, [])


def test_systemd_names_a_wrong_line_of_a_unit(tmp_path: Path) -> None:
    there = tmp_path / "hostd.service"
    there.write_text("[Service]\nExecStart=/bin/true\nKillMode=no-such-mode\n")

    done = run("systemd-analyze", "verify", "--man=no", there)

    assert b"hostd.service:3: Failed to parse" in done.stderr


def test_prometheus_accepts_the_scrape_example_and_the_rules() -> None:
    done = promtool("check", "config", "--lint-fatal", "prometheus.yml")

    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    done = promtool("test", "rules", "hostd.test.yml")

    assert done.returncode == 0, done.stdout + done.stderr


def test_each_recorded_series_has_the_value_of_its_name() -> None:
    done = promtool("test", "rules", "hostd.recording.test.yml")

    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_to_improve_in_the_metrics() -> None:
    done = promtool("check", "metrics", text=used().render())

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
