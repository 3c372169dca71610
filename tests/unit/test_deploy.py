"""What an operator installs is checked: the unit, the example settings, Prometheus' rules."""

import os
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from schemas.settings import Settings
from worker.settings import keys, load_with_origins

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "hostd.service").read_text()


def promtool(*args: str) -> subprocess.CompletedProcess[str]:
    """Run it in deploy/prometheus; without it, skip here and fail in CI."""
    program = shutil.which("promtool", path=f"{ROOT}/build/tools:{os.environ['PATH']}")
    if program is None:
        assert not os.environ.get("CI"), "promtool is missing"
        pytest.skip("promtool is missing")
    return subprocess.run(
        [program, *args],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def directives() -> list[tuple[str, str]]:
    lines = [line for line in UNIT.splitlines() if "=" in line and not line.startswith("#")]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def test_the_example_names_every_setting_with_its_default() -> None:
    path = str(DEPLOY / "config/hostd.toml")

    loaded = load_with_origins(path, {"HOSTD_HOST_ID": "h1"})

    missing = {key.dotted for key in keys() if loaded.origins[key.dotted] == "default"}
    assert missing == set()
    assert msgspec.structs.replace(loaded.settings, host=Settings().host) == Settings()


def test_every_setting_is_in_the_readme_with_variable_default_and_unit() -> None:
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("| `") and "HOSTD_" in line
    ]

    shown = {row[0]: tuple(row[1:4]) for row in rows}
    defaults = {
        key.dotted: (key.env, msgspec.json.encode(key.default).decode(), key.unit) for key in keys()
    }
    assert shown == defaults


def test_vms_outlive_the_unit_and_its_python_is_isolated() -> None:
    unit = dict(directives())

    assert unit["KillMode"] == "process"
    assert unit["ExecStart"].split()[1:4] == ["-I", "-m", "worker"]
    assert unit["Restart"] == "always"
    assert int(unit["TimeoutStopSec"].rstrip("s")) > Settings().limits.shutdown_s


def test_the_unit_has_no_mount_namespace_and_no_filter_that_vmms_would_inherit() -> None:
    prefixes = ("Protect", "Private", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Temporary")
    filters = ("SystemCall", "Restrict", "LockPersonality", "NoNewPrivileges", "MemoryDeny")

    names = [name for name, _ in directives() if name not in {"Restart", "RestartSec"}]
    assert [name for name in names if name.startswith((*prefixes, *filters))] == []


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is missing; a bare container has no systemd")
    there = tmp_path / "hostd.service"
    there.write_text(UNIT.replace("/opt/hostd/bin/python", "/bin/true"))

    done = subprocess.run(
        [analyze, "verify", "--man=no", there],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    ours = [line for line in done.stderr.splitlines() if "hostd.service" in line]
    assert (done.returncode, ours) == (0, [])


def test_prometheus_accepts_the_scrape_example_and_the_rules() -> None:
    done = promtool("check", "config", "--lint-fatal", "prometheus.yml")

    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    done = promtool("test", "rules", "hostd.test.yml")

    assert done.returncode == 0, done.stdout + done.stderr
