"""The Debian package on a host with a booted systemd, and one VM that outlives all of it.

It runs once, in order, and records observations; each test checks one guarantee. The "next" release
is the same package with a higher version. NATS is a server of the test's own.
"""

import asyncio
import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.console import steps
from tests.guests.cache import BUILD
from tests.guests.firecracker import FIRECRACKER, JAILER
from worker.demo.nats_server import EmbeddedNats

PACKAGES = Path("/packages")
OPERATIONS = PACKAGES / "operations.md"
FIRST, NEXT = "hostd_1.deb", "hostd_2.deb"
HOST, CREDENTIALS = "lab-host", "live:host"
USERS = "authorization { user: live, password: host }"
INSTANCE = ("acme", "web", "i1")
SETTINGS = f"""\
[host]
id = "{HOST}"
[nats]
url = "nats://127.0.0.1:{{port}}"
[vmm]
firecracker = "{FIRECRACKER}"
jailer = "{JAILER}"
[metrics]
listen = ""
[limits]
disk_reserve_mib = 64
"""
# 60 s would be waited for; a third of this is still the worker's own rhythm.
SHORT_WATCHDOG = "[Service]\nWatchdogSec=10s\nTimeoutAbortSec=2s\n"


@dataclass(frozen=True, slots=True)
class Look:
    """The unit and the VM at one moment. `vm` is the VMM's PID and start time, by the kernel."""

    active: str
    version: str
    worker: int
    restarts: int
    status: str
    vm: tuple[int, int]


@dataclass
class Package:
    """All observations; `seen` by moment, `said` what dpkg printed, `files` of the package."""

    seen: dict[str, Look] = field(default_factory=dict[str, Look])
    said: dict[str, str] = field(default_factory=dict[str, str])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


# Of the test's own settings none is for the worker that is installed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("HOSTD_")}


def run(*argv: str, ok: bool = True, timeout_s: float = 300.0) -> str:
    """Stdout and stderr of a program that has to succeed, unless not `ok`."""
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=timeout_s, check=False, env=ENVIRONMENT
    )
    assert not ok or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}{journal()}"
    return done.stdout + done.stderr


def journal() -> str:
    argv = ["journalctl", "-u", "hostd", "-n", "300", "--no-pager", "-o", "cat"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def hostd(*argv: str) -> Any:
    return json.loads(run("hostd", *argv, "--json").partition("\n")[0])


def command(*argv: str) -> Any:
    return hostd(*argv, "--creds", "/etc/hostd/nats.creds")


def unit() -> dict[str, str]:
    """The properties of the unit that the tests look at, with one call: it takes a second here."""
    names = ("ActiveState", "MainPID", "NRestarts", "StatusText")
    lines = run("systemctl", "show", "hostd", "-p", ",".join(names)).splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def firecracker() -> tuple[int, int]:
    """PID and start time (clock ticks since the boot) of the only VMM."""
    found: list[tuple[int, int]] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, stat = (entry / "comm").read_text(), (entry / "stat").read_text()
        except OSError:
            continue
        if name.strip() == "firecracker":
            found.append((int(entry.name), int(stat.rpartition(")")[2].split()[19])))
    assert len(found) == 1, found
    return found[0]


def look() -> Look:
    shown, now = command("show", *INSTANCE), unit()
    return Look(
        active=now["ActiveState"],
        version=run("dpkg-query", "-W", "-f", "${Version}", "hostd"),
        worker=int(now["MainPID"]),
        restarts=int(now["NRestarts"]),
        status=shown["status"],
        vm=firecracker(),
    )


def install(name: str) -> str:
    return run("dpkg", "--force-unsafe-io", "-i", str(PACKAGES / name))


async def until_restarted(than: int) -> None:
    """Wait until systemd has started another worker and that one is ready."""
    async with asyncio.timeout(300):
        while (now := unit())["ActiveState"] != "active" or now["MainPID"] in {"0", str(than)}:
            await asyncio.sleep(1)


def settle_settings(port: int) -> None:
    Path("/etc/hostd/hostd.toml").write_text(SETTINGS.format(port=port))
    credentials = Path("/etc/hostd/nats.creds")
    credentials.write_text(CREDENTIALS + "\n")
    credentials.chmod(0o600)


def first_hour(port: int) -> list[str]:
    """The commands of the block in docs/operations.md.

    There is no apt in the lab, and what an editor would do is done by `cp`; the files that are
    named without a directory are in one of the test's.
    """
    (step,) = steps(OPERATIONS, "test_an_operators_first_hour_works_by_copying")
    directory = Path("/var/tmp/first-hour")
    directory.mkdir()
    (directory / "hostd.toml").write_text(SETTINGS.format(port=port))
    for name in ("h1.creds", "admin.creds", "agentd-h1.creds"):
        (directory / name).write_text(CREDENTIALS + "\n")
        (directory / name).chmod(0o600)
    words = {
        "apt install ./hostd_0.1.0_amd64.deb": f"dpkg --force-unsafe-io -i {PACKAGES / FIRST}",
        "editor ": f"cp {directory}/hostd.toml ",
        " h1.creds": f" {directory}/h1.creds",
        " admin.creds": f" {directory}/admin.creds",
        " agentd-h1.creds": f" {directory}/agentd-h1.creds",
    }
    text = step.block.text
    for there, here in words.items():
        assert there in text
        text = text.replace(there, here)
    return [re.sub(r" +#.*", "", line) for line in text.splitlines()]


def here() -> list[str]:
    """What the package, its unit or its worker may have made."""
    places = ("/opt/hostd", "/etc/hostd", "/var/lib/hostd", "/run/hostd", "/usr/bin/hostd")
    units = Path("/etc/systemd/system").rglob("hostd*")
    return [place for place in places if os.path.lexists(place)] + [str(unit) for unit in units]


async def live(nats: EmbeddedNats) -> Package:
    package = Package()
    commands = first_hour(nats.port)
    package.said["first"] = run("bash", "-c", commands[0])
    package.facts["enabled"] = run("systemctl", "is-enabled", "hostd", ok=False).strip()
    package.facts["active"] = run("systemctl", "is-active", "hostd", ok=False).strip()
    package.facts["verify"] = run("systemd-analyze", "verify", "hostd.service", ok=False)
    package.facts["security"] = run("systemd-analyze", "security", "hostd", "--no-pager")
    exported = "\n".join(line for line in commands if line.startswith("export "))
    hour = {line: run("bash", "-c", f"{exported}\n{line}") for line in commands[1:]}
    package.facts["hour"] = hour
    mini = BUILD / "guests/mini"
    artifacts = ["--vmlinux", str(mini / "vmlinux"), "--rootfs", str(mini / "rootfs.ext4")]
    hostd("seed", *INSTANCE, "--net-id", "7", "--mem-mib", "32", *artifacts)
    command("net-up", INSTANCE[0])
    command("start", *INSTANCE)
    package.seen["started"] = look()
    package.facts["status"] = unit()["StatusText"]

    package.said["next"] = install(NEXT)
    package.seen["upgraded"] = look()
    package.said["back"] = install(FIRST)
    package.seen["back"] = look()

    drop_in = Path("/etc/systemd/system/hostd.service.d")
    drop_in.mkdir(parents=True)
    (drop_in / "watchdog.conf").write_text(SHORT_WATCHDOG)
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", "hostd")
    before = look()
    run("kill", "-STOP", str(before.worker))
    await until_restarted(before.worker)
    package.seen["before the watchdog"], package.seen["after the watchdog"] = before, look()
    package.facts["watchdog"] = journal()
    (drop_in / "watchdog.conf").unlink()
    drop_in.rmdir()

    package.said["removed"] = run("dpkg", "-r", "hostd")
    package.facts["removed"] = (here(), firecracker())
    package.said["purged with a VM"] = run("dpkg", "-P", "hostd")
    package.facts["purged with a VM"] = (here(), firecracker())
    install(FIRST)
    settle_settings(nats.port)
    run("systemctl", "enable", "--now", "hostd")
    package.seen["installed again"] = look()

    for argv in (("stop", *INSTANCE), ("destroy", *INSTANCE), ("net-down", INSTANCE[0])):
        command(*argv)
    package.facts["inventory"] = hostd("inventory")
    package.said["purged"] = run("dpkg", "-P", "hostd")
    Path("/etc/hostd/nats.creds").unlink(missing_ok=True)
    package.facts["purged"] = here()
    return package


async def with_server() -> Package:
    nats = EmbeddedNats("/var/tmp/package-nats", config=USERS)
    await nats.start()
    try:
        return await live(nats)
    finally:
        await nats.stop()


@pytest.fixture(scope="module")
def package() -> Package:
    return asyncio.run(asyncio.wait_for(with_server(), 1500))


def test_a_new_host_is_told_what_to_write_and_nothing_runs(package: Package) -> None:
    assert "hostd check-config; systemctl enable --now hostd" in package.said["first"]
    assert (package.facts["enabled"], package.facts["active"]) == ("disabled", "inactive")


def test_an_operators_first_hour_works_by_copying(package: Package) -> None:
    *_, before, _, _, after, pong = package.facts["hour"].values()

    assert "error:" not in before + after
    assert pong.startswith("ok: host, ")


def test_the_unit_is_ready_once_the_worker_answers(package: Package) -> None:
    assert package.seen["started"].active == "active"
    assert package.seen["started"].status == "running"
    assert package.facts["status"]


@pytest.mark.parametrize("moment", ["upgraded", "back", "after the watchdog", "installed again"])
def test_the_vm_does_not_notice(package: Package, moment: str) -> None:
    started, now = package.seen["started"], package.seen[moment]

    assert now.worker != started.worker
    assert (now.active, now.status, now.vm) == ("active", "running", started.vm)


def test_an_upgrade_and_the_way_back_run_the_installed_version(package: Package) -> None:
    versions = {moment: seen.version for moment, seen in package.seen.items()}

    assert versions["started"] == versions["back"] == "1"
    assert versions["upgraded"] == "2"


def test_a_worker_that_hangs_is_ended_by_the_watchdog(package: Package) -> None:
    before, after = package.seen["before the watchdog"], package.seen["after the watchdog"]

    assert "Fatal Python error: Aborted" in package.facts["watchdog"]  # its SIGABRT
    assert after.restarts > before.restarts


def test_a_removal_keeps_settings_and_state(package: Package) -> None:
    assert package.facts["removed"] == (
        ["/etc/hostd", "/var/lib/hostd", "/run/hostd"],
        package.seen["started"].vm,
    )


def test_a_purge_with_instances_keeps_their_state_and_says_so(package: Package) -> None:
    assert "/var/lib/hostd is kept" in package.said["purged with a VM"]
    assert package.facts["purged with a VM"] == (
        ["/etc/hostd", "/var/lib/hostd", "/run/hostd"],  # the first with the operator's credentials
        package.seen["started"].vm,
    )


def test_a_purge_of_an_empty_host_leaves_nothing(package: Package) -> None:
    assert {kind: names for kind, names in package.facts["inventory"].items() if names} == {}
    assert package.facts["purged"] == ["/etc/hostd"]  # with the operator's own credentials
    assert not Path("/var/lib/hostd").exists()


def test_systemd_finds_no_fault_in_the_unit(package: Package) -> None:
    assert [line for line in package.facts["verify"].splitlines() if "hostd" in line] == []


def test_the_units_exposure_does_not_grow(package: Package) -> None:
    found = re.search(r"exposure level for hostd.service: ([0-9.]+)", package.facts["security"])

    assert found is not None, package.facts["security"]
    assert float(found[1]) <= 9.0
