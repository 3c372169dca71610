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
EXAMPLE = "mkdir /usr/share/hostd; echo example > /usr/share/hostd/hostd.toml\n"
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
    (tmp_path / "bin").mkdir()
    for name, text in (("systemctl", SYSTEMCTL), ("systemd-tmpfiles", "#!/bin/sh\n")):
        program = tmp_path / "bin" / name
        program.write_text(text)
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
        before=f"{EXAMPLE}touch /run/hostd.upgrade",
        after="! test -e /run/hostd.upgrade",
        START_RC="1",
    )

    assert done.returncode == 0, done.stderr
    assert "start hostd.service" in calls.read_text().splitlines()
    assert "hostd: does not start, see journalctl -u hostd" in done.stderr


# -- purges ----------------------------------------------------------------------------------------

STATE = "/var/lib/hostd"
LEFT = f"find {STATE} | sort"
OWN = f"""\
mkdir -p {STATE}/logs {STATE}/snapshots/t/p {STATE}/jails/firecracker
touch {STATE}/journal
"""
ELSEWHERE = f"""\
mkdir {STATE}/jails/firecracker/i-1
mv {STATE} /var/lib/real
ln -s real {STATE}
"""
EVENTS = "/sys/fs/cgroup/hostd/cgroup.events"


@pytest.mark.parametrize(
    "made",
    [
        f"mkdir -p {STATE}/jails/firecracker/i-1",
        f"mkdir -p {STATE}/elsewhere/jails/firecracker/i-1",
        f"mkdir -p {STATE}/snapshots/t/p/i/1",
        ELSEWHERE,
        f"mkdir /sys/fs/cgroup/hostd; echo populated 1 > {EVENTS}",
    ],
    ids=["jail", "jail base elsewhere", "snapshot", "symlink", "VM"],
)
def test_a_purge_keeps_the_state_while_there_is_something_of_an_instance(
    calls: Path, made: str
) -> None:
    done = run(calls, "postrm", "purge", before=f"{OWN}{made}", after=f"test -e {STATE}/journal")

    assert (done.returncode, f"{STATE} is kept" in done.stderr) == (0, True), done.stderr


def test_a_purge_keeps_a_state_that_it_cannot_read(calls: Path) -> None:
    find = calls.parent / "bin/find"
    find.write_text("#!/bin/sh\nexit 1\n")
    find.chmod(0o755)

    done = run(calls, "postrm", "purge", before=OWN, after=f"test -e {STATE}/journal")

    assert (done.returncode, f"{STATE} is kept" in done.stderr) == (0, True), done.stderr


def test_a_purge_of_a_mount_point_empties_it(calls: Path) -> None:
    mount = f"mkdir {STATE}; mount -t tmpfs tmpfs {STATE}\n{OWN}"

    done = run(calls, "postrm", "purge", before=mount, after=LEFT)

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{STATE}\n", "")


def test_a_purge_goes_into_no_other_file_system(calls: Path) -> None:
    mount = (
        f"{OWN}mkdir {STATE}/other; mount -t tmpfs tmpfs {STATE}/other; touch {STATE}/other/file"
    )

    done = run(calls, "postrm", "purge", before=mount, after=LEFT)

    assert (done.returncode, done.stdout) == (0, f"{STATE}\n{STATE}/other\n{STATE}/other/file\n")
    assert f"{STATE} is not empty" in done.stderr


@pytest.mark.parametrize("before", ["", OWN], ids=["nothing", "own files"])
def test_a_purge_leaves_nothing_of_a_host_without_instances(calls: Path, before: str) -> None:
    idle = f"mkdir /sys/fs/cgroup/hostd /run/hostd; echo populated 0 > {EVENTS}\n"

    done = run(
        calls, "postrm", "purge", before=idle + before, after="! test -e /run/hostd; ls /var/lib"
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- settings --------------------------------------------------------------------------------------

SETTINGS = "/etc/hostd/hostd.toml"


def test_a_host_without_settings_gets_the_example_for_root_only(calls: Path) -> None:
    show = f"stat -c %a {SETTINGS}; cat {SETTINGS}"

    done = run(calls, "postinst", "configure", "1", before=EXAMPLE, after=show)

    assert (done.returncode, done.stdout, done.stderr) == (0, "600\nexample\n", "")


@pytest.mark.parametrize("call", ["configure 1", "abort-upgrade 1"])
def test_an_upgrade_leaves_the_settings_alone(calls: Path, call: str) -> None:
    edited = f"{EXAMPLE}mkdir /etc/hostd; echo edited > {SETTINGS}"

    done = run(calls, "postinst", call, before=edited, after=f"cat {SETTINGS}")

    assert (done.returncode, done.stdout, done.stderr) == (0, "edited\n", "")


def test_a_purge_removes_the_settings_and_no_credentials(calls: Path) -> None:
    made = f"mkdir /etc/hostd; touch {SETTINGS} /etc/hostd/nats.creds"

    done = run(calls, "postrm", "purge", before=made, after="ls /etc/hostd")

    assert (done.returncode, done.stdout, done.stderr) == (0, "nats.creds\n", "")


def test_a_removal_keeps_the_settings(calls: Path) -> None:
    made = f"mkdir /etc/hostd; touch {SETTINGS}"

    done = run(calls, "postrm", "remove", before=made, after=f"test -e {SETTINGS}")

    assert done.returncode == 0, done.stderr
