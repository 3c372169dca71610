"""Checks of the host: each thing that is wrong is one finding that says what to run."""

import os
from dataclasses import replace as of
from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.errors import HostFault
from schemas.settings import LimitSettings, NatsSettings, Settings
from tests.unit.test_preflight import settings_in
from worker.doctor import host_checks
from worker.doctor.findings import Finding, Severity, run_checks
from worker.doctor.host_checks import HostChecks, System
from worker.preflight import IdRange

SOUND = System(
    release="6.1.0",
    uid=0,
    devices={},
    has_program=lambda name: True,
    has_libnftables=lambda: True,
    sysctl={"netfilter/nf_conntrack_max": "1000", "netfilter/nf_conntrack_count": "10"}.get,
)


def no_program(name: str) -> bool:
    return False


def only_without_nft(name: str) -> bool:
    return name != "nft"


def always_900(name: str) -> str:
    return "900"


def no_sysctl(name: str) -> None:
    return None


NO_LIBRARY = of(SOUND, has_libnftables=lambda: False)
NEITHER = of(NO_LIBRARY, has_program=only_without_nft)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = settings_in(tmp_path)
    for path in (made.paths.state, made.jail_base, made.paths.data, made.paths.run):
        os.makedirs(path, mode=0o700, exist_ok=True)
    return replace(made, limits=LimitSettings(enforce=False, disk_reserve_mib=0))


async def found_by(check: str, settings: Settings, system: System = SOUND) -> list[Finding]:
    return [*await HostChecks(settings, system).all()[check]()]


@pytest.mark.parametrize(
    "check", ["user", "kernel", "programs", "directories", "disk", "conntrack"]
)
async def test_a_sound_host_has_no_findings(settings: Settings, check: str) -> None:
    assert await found_by(check, settings) == []


@pytest.mark.parametrize(
    ("check", "system", "severity", "what", "run"),
    [
        ("user", of(SOUND, uid=1000), "warning", "without root", "sudo hostd doctor"),
        ("kernel", of(SOUND, release="5.10.0-8"), "error", "older than 5.14", "newer kernel"),
        ("kernel", of(SOUND, devices={"/none": "modprobe x"}), "error", "/none", "modprobe x"),
        ("programs", of(SOUND, has_program=no_program), "error", "mkfs.ext4", "e2fsprogs"),
        ("programs", NO_LIBRARY, "warning", "libnft", "libnftables1"),
        ("programs", NEITHER, "error", "libnft", "libnftables1"),
        ("conntrack", of(SOUND, sysctl=always_900), "error", "900 of 900", "sysctl -w"),
    ],
)
async def test_what_is_wrong_is_found_with_what_to_run(
    settings: Settings,
    check: str,
    system: System,
    severity: str,
    what: str,
    run: str,
) -> None:
    (finding,) = await found_by(check, settings, system)

    assert (finding.severity, finding.check) == (severity, check)
    assert what in finding.what
    assert run in finding.run
    assert finding.why


async def test_a_kernel_without_conntrack_is_none_of_doctors_business(settings: Settings) -> None:
    assert await found_by("conntrack", settings, of(SOUND, sysctl=no_sysctl)) == []


async def test_limits_that_are_off_are_explained(settings: Settings) -> None:
    off = replace(settings, limits=LimitSettings(enforce=False))

    (finding,) = await found_by("cgroup", off)

    assert finding.severity is Severity.INFO


async def test_what_the_worker_would_refuse_at_its_start_is_an_error(settings: Settings) -> None:
    production = replace(settings, nats=NatsSettings(url="nats://10.0.0.1:4222"))
    production = replace(production, host=replace(production.host, production=True))

    (connection,) = await found_by("connection", production)
    (vmm,) = await found_by("vmm", replace(settings, vmm=replace(settings.vmm, jailer="/none")))

    assert "beyond loopback" in connection.what
    assert "/none" in vmm.what or "cannot execute" in vmm.what


async def test_a_directory_of_versions_needs_a_pair(settings: Settings, tmp_path: Path) -> None:
    versions = tmp_path / "versions"
    versions.mkdir(mode=0o755)
    several = replace(settings, vmm=replace(settings.vmm, versions_dir=str(versions)))
    (versions / "firecracker-v1.16.1").touch(mode=0o755)
    (lonely,) = await found_by("vmm", several)
    (versions / "jailer-v1.16.1").touch(mode=0o755)

    assert await found_by("vmm", several) == []
    assert lonely.severity is Severity.ERROR


@pytest.mark.parametrize(
    ("version", "wanted", "mode", "part"),
    [
        ("1.16.1-x86_64", "", 0o755, "no Firecracker to start VMs with"),
        ("1.16.1", "1.15.0", 0o755, "no Firecracker 1.15.0"),
        ("0.9.0", "", 0o755, "0.9.0"),
        ("1.16.1", "", 0o775, "versions"),
    ],
)
async def test_a_directory_of_versions_by_which_no_worker_starts_is_found(
    settings: Settings, tmp_path: Path, version: str, wanted: str, mode: int, part: str
) -> None:
    versions = tmp_path / "versions"
    versions.mkdir()
    versions.chmod(mode)
    for name in ("firecracker", "jailer"):
        (versions / f"{name}-v{version}").touch(mode=0o755)
    vmm = replace(settings.vmm, versions_dir=str(versions), version=wanted)

    (finding,) = await found_by("vmm", replace(settings, vmm=vmm))

    assert finding.severity is Severity.ERROR
    assert part in finding.what


@pytest.mark.parametrize(("text", "mode"), [("{}", 0o664), ("[[", 0o644), (None, 0)])
async def test_a_policy_by_which_no_worker_starts_is_found(
    settings: Settings, tmp_path: Path, text: str | None, mode: int
) -> None:
    path = tmp_path / "policy.json"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    changed = replace(settings, network=replace(settings.network, policy=str(path)))

    (finding,) = await found_by("policy", changed)

    assert finding.severity is Severity.ERROR
    assert str(path) in finding.what


async def test_traces_need_their_extra(settings: Settings) -> None:
    traced = replace(settings, trace=replace(settings.trace, endpoint="http://127.0.0.1:4318"))
    without = of(SOUND, has_tracing=lambda: False)

    (finding,) = await found_by("trace", traced, without)
    assert "OpenTelemetry" in finding.what
    assert await found_by("trace", traced, of(SOUND, has_tracing=lambda: True)) == []
    assert await found_by("trace", settings, without) == []


async def test_the_authorities_of_a_collector_are_read(settings: Settings, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    trace = replace(settings.trace, endpoint="https://127.0.0.1:4318", ca=str(ca))
    traced, found = replace(settings, trace=trace), of(SOUND, has_tracing=lambda: True)

    (finding,) = await found_by("trace", traced, found)
    ca.touch()

    assert finding.severity is Severity.ERROR
    assert f"[trace] ca {ca} cannot be read" in finding.what
    assert finding.run == f"ls -l {ca}"
    assert await found_by("trace", traced, found) == []


async def test_a_directory_that_others_can_enter_is_found(settings: Settings) -> None:
    os.chmod(settings.paths.state, 0o755)

    (finding,) = await found_by("directories", settings)

    assert finding.run == f"chmod 700 {settings.paths.state}"


async def test_directories_that_are_not_there_yet_are_no_fault(tmp_path: Path) -> None:
    (finding,) = await found_by("directories", settings_in(tmp_path))

    assert finding.severity is Severity.INFO


async def test_a_disk_below_the_reserve_is_found(settings: Settings) -> None:
    huge = replace(settings, limits=LimitSettings(disk_reserve_mib=1 << 40))

    (finding,) = await found_by("disk", huge)

    assert "disk_reserve_mib" in finding.what


async def test_uids_that_a_user_has_are_found(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = IdRange("/etc/passwd", "ann", 5, 1)

    def find(base: int, count: int) -> IdRange:
        return taken

    monkeypatch.setattr(host_checks, "find_uid_overlap", find)

    (finding,) = await found_by("uids", settings)

    assert "/etc/passwd: ann" in finding.what


async def test_a_check_that_fails_is_a_finding_and_the_others_run() -> None:
    async def refused() -> list[Finding]:
        raise HostFault("no permission")

    async def gone() -> list[Finding]:
        raise FileNotFoundError(2, "No such file", "/x")

    async def bug() -> list[Finding]:
        raise KeyError("x")

    async def info() -> list[Finding]:
        return [Finding(Severity.INFO, "d", "w", "y", "r")]

    async def error() -> list[Finding]:
        return [Finding(Severity.ERROR, "e", "w", "y", "r")]

    found = await run_checks({"d": info, "a": refused, "b": gone, "c": bug, "e": error})

    assert [finding.check for finding in found] == ["e", "a", "b", "c", "d"]
    assert "no permission" in found[1].what
