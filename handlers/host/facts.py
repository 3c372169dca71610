"""What is true of this host as a whole, read from /proc, /etc and the file systems."""

import os
from functools import cached_property

from handlers.clock import now_ms

MACHINE_ID = "/etc/machine-id"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
CPU_FIELDS = ("vendor_id", "cpu family", "model", "stepping", "model name")


class HostFacts:
    """Implements `interfaces.HostFacts`. What cannot change while hostd runs is read once."""

    def now_ms(self) -> int:
        """Wall clock, Unix milliseconds."""
        return now_ms()

    def boot_id(self) -> str:
        """New at each boot. Source: proc_sys_kernel(5)."""
        return self._boot_id

    def memory_mib(self) -> int:
        """All memory of the host. Source: sysconf(3)."""
        return self._memory_mib

    def machine_id(self) -> str:
        """Of this installation, 32 hex; empty if it has none. Source: machine-id(5)."""
        return self._machine_id

    def kernel_release(self) -> str:
        """As `uname -r` says."""
        return os.uname().release

    def cpu_model(self) -> str:
        """Vendor, family, model, stepping and name of the first CPU, one line.

        A memory snapshot holds CPU state and belongs to this. Not the microcode: an update of it
        would throw all sleepers away. Source: proc_cpuinfo(5).
        """
        return self._cpu_model

    @cached_property
    def _boot_id(self) -> str:
        return _read(BOOT_ID).strip()

    @cached_property
    def _memory_mib(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20

    @cached_property
    def _machine_id(self) -> str:
        try:
            return _read(MACHINE_ID).strip()
        except FileNotFoundError:
            return ""

    @cached_property
    def _cpu_model(self) -> str:
        first = _read("/proc/cpuinfo").partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        fields = {name.strip(): value.strip() for name, _, value in pairs}
        known = [fields[name] for name in CPU_FIELDS if name in fields]
        return " ".join(known) or os.uname().machine


def file_system(path: str) -> str:
    """The type of the file system that holds an existing path, e.g. `ext4`; empty if not listed.

    Source: proc_pid_mountinfo(5).
    """
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in _read("/proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split(" ")[2] == number:
            return source.split(" ", 1)[0]
    return ""


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
