"""The Debian package's maintainer scripts with their real paths, in a mount namespace of their own.

`tests/lab/booted/test_package.py` runs them with dpkg and systemd; here are the cases that would
take a lab of their own.
"""

import subprocess
from pathlib import Path

import pytest

from tests.guests.cache import REPOSITORY

SCRIPTS = REPOSITORY / "deploy/debian"
PRIVATE = ("/run", "/etc", "/var/lib", "/usr/share", "/sys/fs/cgroup")
SYSTEMCTL = """\
#!/bin/sh
[ "$1" != -q ] || shift
echo "$@" >> "$CALLS"
case $1 in
show) echo "$ACTIVE_STATE" ;;
is-active) [ "$ACTIVE_STATE" = active ] ;;
start) exit "$START_RC" ;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """The file with the calls of systemctl, one per line."""
    program = tmp_path / "bin/systemctl"
    program.parent.mkdir()
    program.write_text(SYSTEMCTL)
    program.chmod(0o755)
    file = tmp_path / "calls"
    file.touch()
    return file


def run(
    calls: Path, script: str, *args: str, before: str = "", after: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script among empty directories of its own, after and before shell commands."""
    mounts = "".join(f"mount -t tmpfs tmpfs {path}\n" for path in PRIVATE)
    lines = f"set -e\n{mounts}mkdir -p /run/systemd/system\n{before}\n"
    lines += f"sh {SCRIPTS / script} {' '.join(args)}\n{after}\n"
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", lines],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PATH": f"{calls.parent / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
            "CALLS": str(calls),
            "ACTIVE_STATE": "inactive",
            "START_RC": "0",
            **env,
        },
    )


# -- upgrades --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["active", "reloading", "activating", "deactivating"])
def test_an_upgrade_stops_a_worker_in_any_state_and_will_start_it_again(
    calls: Path, state: str
) -> None:
    done = run(
        calls, "preinst", "upgrade", "1", after="test -e /run/hostd.upgrade", ACTIVE_STATE=state
    )

    assert done.returncode == 0, done.stderr
    assert "stop hostd.service" in calls.read_text().splitlines()


@pytest.mark.parametrize("state", ["inactive", "failed"])
def test_an_upgrade_does_not_start_a_worker_that_did_not_run(calls: Path, state: str) -> None:
    done = run(
        calls, "preinst", "upgrade", "1", after="! test -e /run/hostd.upgrade", ACTIVE_STATE=state
    )

    assert done.returncode == 0, done.stderr
    assert "stop hostd.service" not in calls.read_text().splitlines()


def test_a_worker_that_does_not_start_does_not_fail_the_configuration(calls: Path) -> None:
    done = run(
        calls,
        "postinst",
        "configure",
        "1",
        before="touch /run/hostd.upgrade",
        after="! test -e /run/hostd.upgrade",
        START_RC="1",
    )

    assert done.returncode == 0, done.stderr
    assert "start hostd.service" in calls.read_text().splitlines()
    assert "hostd: does not start, see journalctl -u hostd" in done.stderr
