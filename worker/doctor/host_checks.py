"""Checks that need no worker: settings, kernel, programs, directories, disk, limits of the kernel.

They read and change nothing. What a worker itself checks at its start is checked by the same code,
so a host without findings here starts one.
"""

import asyncio
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Final

from handlers.errors import Failure
from handlers.host.net.nft import libnftables
from handlers.host.net.policy_file import read_policy
from handlers.host.net.sysctl import read_sysctl
from handlers.host.storage.mkfs import MKFS
from handlers.host.vmm.binaries import Pair, start_of
from handlers.host.vmm.binary_files import read_sources
from handlers.host.vmm.cgroups import check_controllers
from handlers.host.vmm.versions import check_supported, parse_version, version_of_pair
from schemas.settings import Settings, VmmSettings
from worker.doctor.findings import Checks, Finding, Severity
from worker.preflight import check_connection, check_dirs, find_uid_overlap

OLDEST_KERNEL: Final = (5, 14)
DEVICES: Final[Mapping[str, str]] = {
    "/dev/kvm": "modprobe kvm_intel or kvm_amd, or enable nested virtualization",
    "/dev/net/tun": "modprobe tun",
}
FULL_PERCENT: Final = 90
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class System:
    """Where the checks look; tests pass their own."""

    release: str = field(default_factory=lambda: os.uname().release)
    uid: int = field(default_factory=os.geteuid)
    devices: Mapping[str, str] = field(default_factory=lambda: DEVICES)
    has_program: Callable[[str], bool] = lambda name: shutil.which(name) is not None
    has_libnftables: Callable[[], bool] = libnftables.is_there
    has_tracing: Callable[[], bool] = lambda: find_spec("opentelemetry") is not None
    sysctl: Callable[[str], str | None] = read_sysctl


class HostChecks:
    """Each method is one check and returns its findings."""

    def __init__(self, settings: Settings, system: System | None = None) -> None:
        self._settings = settings
        self._system = system or System()

    def all(self) -> Checks:
        return {
            "user": self.user,
            "kernel": self.kernel,
            "cgroup": self.cgroup,
            "programs": self.programs,
            "vmm": self.vmm,
            "policy": self.policy,
            "trace": self.trace,
            "connection": self.connection,
            "directories": self.directories,
            "uids": self.uids,
            "disk": self.disk,
            "conntrack": self.conntrack,
        }

    async def user(self) -> Iterable[Finding]:
        if self._system.uid == 0:
            return []
        return [
            Finding(
                Severity.WARNING,
                "user",
                "doctor runs without root",
                "directories, the kernel and the worker's socket cannot be read",
                "sudo hostd doctor",
            )
        ]

    async def kernel(self) -> Iterable[Finding]:
        found: list[Finding] = []
        numbers = re.match(r"(\d{1,9})\.(\d{1,9})", self._system.release)
        if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_KERNEL:
            found.append(
                _error(
                    "kernel",
                    f"Linux {self._system.release} is older than 5.14",
                    "hostd uses cgroup.kill and other interfaces that it lacks",
                    "install a newer kernel and reboot",
                )
            )
        for device, remedy in self._system.devices.items():
            if not os.access(device, os.R_OK | os.W_OK):
                found.append(
                    _error(
                        "kernel", f"{device} is missing or not accessible", "no VM starts", remedy
                    )
                )
        return found

    async def cgroup(self) -> Iterable[Finding]:
        if problem := _failure(lambda: check_controllers(self._settings)):
            return [_error("cgroup", problem, "the worker does not start", "mount | grep cgroup")]
        if not self._settings.limits.enforce:
            return [
                Finding(
                    Severity.INFO,
                    "cgroup",
                    "[limits] enforce = false: VMs run without limits",
                    "one VM can use up the host; for development only",
                    "hostd check-config",
                )
            ]
        return []

    async def programs(self) -> Iterable[Finding]:
        found: list[Finding] = []
        if not self._system.has_program(MKFS):
            found.append(
                _error(
                    "programs",
                    f"{MKFS} is not installed",
                    "no data disk and no small drive can be made: every Start fails",
                    "apt-get install e2fsprogs",
                )
            )
        if not self._system.has_libnftables():
            severity = Severity.WARNING if self._system.has_program("nft") else Severity.ERROR
            found.append(
                Finding(
                    severity,
                    "programs",
                    f"{libnftables.LIBRARY} is not installed",
                    "rules are changed by the slower nft, and hostd_guard cannot protect them "
                    "against other programs (ADR 0406)",
                    "apt-get install libnftables1",
                )
            )
        return found

    async def vmm(self) -> Iterable[Finding]:
        vmm = self._settings.vmm
        if vmm.versions_dir:
            return self._versions_dir(vmm)
        try:
            version = await version_of_pair(vmm.firecracker, vmm.jailer)
            check_supported(version, allow_untested=vmm.allow_untested)
        except Failure as failure:
            return [
                _error(
                    "vmm",
                    failure.message,
                    "the worker does not start",
                    f"{vmm.firecracker} --version; {vmm.jailer} --version",
                )
            ]
        return []

    def _versions_dir(self, vmm: VmmSettings) -> Iterable[Finding]:
        """What their names and owners say; a worker copies and executes them, too."""

        def check() -> None:
            sources, problems = read_sources(vmm.versions_dir)
            pairs: dict[str, Pair] = {}
            for text, paths in sources.items():
                version = parse_version(text)
                try:
                    check_supported(version, allow_untested=vmm.allow_untested)
                except Failure as failure:
                    problems[text] = failure.message
                else:
                    pairs[text] = Pair(version, *paths)
            start_of(pairs, problems, vmm)

        if problem := _failure(check):
            remedy = f"ls -l {vmm.versions_dir}"
            return [_error("vmm", problem, "the worker does not start", remedy)]
        return []

    async def policy(self) -> Iterable[Finding]:
        path = self._settings.network.policy
        if path and (problem := _failure(lambda: read_policy(path, None))):
            return [_error("policy", problem, "the worker does not start", f"ls -l {path}")]
        return []

    async def trace(self) -> Iterable[Finding]:
        trace = self._settings.trace
        if trace.endpoint and not self._system.has_tracing():
            return [
                _error(
                    "trace",
                    "[trace] endpoint is set, but OpenTelemetry is not installed",
                    "the worker does not start",
                    "install hostd[otel], or unset it",
                )
            ]
        if trace.endpoint and trace.ca and not os.access(trace.ca, os.R_OK):
            problem = f"[trace] ca {trace.ca} cannot be read"
            return [_error("trace", problem, "the worker does not start", f"ls -l {trace.ca}")]
        return []

    async def connection(self) -> Iterable[Finding]:
        if problem := _failure(lambda: check_connection(self._settings)):
            return [
                _error("connection", problem, "the worker does not start", "hostd check-config")
            ]
        return []

    async def directories(self) -> Iterable[Finding]:
        paths = self._settings.paths
        wanted = (paths.state, self._settings.jail_base, paths.data)
        if missing := [path for path in wanted if not os.path.isdir(path)]:
            return [
                Finding(
                    Severity.INFO,
                    "directories",
                    f"not there yet: {', '.join(missing)}",
                    "the worker makes them at its first start",
                    "systemctl start hostd",
                )
            ]
        if problem := _failure(lambda: check_dirs(self._settings)):
            return [_error("directories", problem, "the worker does not start", "findmnt -T PATH")]
        open_ones = [
            path
            for path in (paths.state, self._settings.jail_base)
            if os.stat(path).st_mode & 0o077
        ]
        return [
            Finding(
                Severity.WARNING,
                "directories",
                f"{path} can be entered by other users than root",
                "snapshots with guests' secrets are below it",
                f"chmod 700 {path}",
            )
            for path in open_ones
        ]

    async def uids(self) -> Iterable[Finding]:
        vmm = self._settings.vmm
        taken = find_uid_overlap(vmm.uid_base, vmm.uid_count)
        if taken is None:
            return []
        return [
            _error(
                "uids",
                f"{taken.file}: {taken.owner} has ids of [vmm] uid_base and uid_count",
                "a VMM would run as that user; the worker does not start",
                "choose another [vmm] uid_base; hostd check-config",
            )
        ]

    async def disk(self) -> Iterable[Finding]:
        state = self._settings.paths.state
        if not os.path.isdir(state):
            return []
        there = await asyncio.to_thread(os.statvfs, state)
        free_mib = there.f_bavail * there.f_frsize // MIB
        found: list[Finding] = []
        if free_mib < self._settings.limits.disk_reserve_mib:
            found.append(
                _error(
                    "disk",
                    f"{state} has {free_mib} MiB free, [limits] disk_reserve_mib is "
                    f"{self._settings.limits.disk_reserve_mib}",
                    "Start, Sleep, Wake and imports are refused, and the journal may not commit",
                    f"du -x {state} | sort -n | tail; see docs/operations.md, Full disk",
                )
            )
        if there.f_files and there.f_favail * 100 < there.f_files * (100 - FULL_PERCENT):
            found.append(
                Finding(
                    Severity.WARNING,
                    "disk",
                    f"{state} has {there.f_favail} of {there.f_files} inodes free",
                    "nothing can be made without an inode, however much space is free",
                    f"df -i {state}",
                )
            )
        return found

    async def conntrack(self) -> Iterable[Finding]:
        maximum = self._system.sysctl("netfilter/nf_conntrack_max")
        count = self._system.sysctl("netfilter/nf_conntrack_count")
        if maximum is None or count is None:
            return []
        if int(count) * 100 < int(maximum) * FULL_PERCENT:
            return []
        return [
            _error(
                "conntrack",
                f"{count} of {maximum} tracked connections are in use",
                "when the table is full, new connections of guests and of the host are dropped",
                "sysctl -w net.netfilter.nf_conntrack_max=N; conntrack -S",
            )
        ]


def _failure(check: Callable[[], object]) -> str | None:
    try:
        check()
    except Failure as failure:
        return failure.message
    return None


def _error(check: str, what: str, why: str, run: str) -> Finding:
    return Finding(Severity.ERROR, check, what, why, run)
