"""Facts about this host as a whole, read from /proc and the file systems."""

import contextlib
import os
from functools import cached_property

from handlers.clock import boot_ms, now_ms
from handlers.host.linux import procfs
from schemas.usage import Moment

PRODUCT_UUID = "/sys/class/dmi/id/product_uuid"
NET = "/sys/class/net"
CPU_FIELDS = ("vendor_id", "cpu family", "model", "stepping", "model name")


class HostFacts:
    """The clock, boot, memory, kernel and CPU. What cannot change while hostd runs is read once."""

    def now_ms(self) -> int:
        """Wall clock, Unix milliseconds."""
        return now_ms()

    def moment(self) -> Moment:
        """Now, by the wall clock and by one that is never set."""
        return Moment(now_ms(), boot_ms(), self.boot_id())

    def boot_id(self) -> str:
        """New at each boot."""
        return procfs.boot_id()

    def memory_mib(self) -> int:
        """Total memory of the host. Source: sysconf(3)."""
        return self._memory_mib

    def cpus(self) -> int:
        """The CPUs that this process may run on, and so the VMMs, which inherit it.

        Source: sched_getaffinity(2).
        """
        return len(os.sched_getaffinity(0))

    def kernel_release(self) -> str:
        """The same as `uname -r`."""
        return os.uname().release

    def cpu_model(self) -> str:
        """Vendor, family, model, stepping and name of the first CPU, one line.

        A memory snapshot holds CPU state and is valid only on this CPU model. The microcode is left
        out: an update of it would invalidate every sleeping instance. Source: proc_cpuinfo(5).
        """
        return self._cpu_model

    def hostname(self) -> str:
        """The same as `uname -n`."""
        return os.uname().nodename

    def product_uuid(self) -> str:
        """Of the machine's firmware; empty without one, or if it is all of the same digit.

        A copied disk does not contain it. Source: sysfs, /sys/class/dmi/id. Needs: root.
        """
        with contextlib.suppress(OSError), open(PRODUCT_UUID, encoding="ascii") as file:
            text = file.read(64).strip().lower()
            return text if len(set(text) - {"-"}) > 1 else ""
        return ""

    def macs(self) -> tuple[str, ...]:
        """Addresses of the physical interfaces, in order; of none that hostd or a bridge made.

        Source: sysfs, /sys/class/net: only an interface of a device has the symlink `device`.
        """
        found: set[str] = set()
        names = os.listdir(NET) if os.path.isdir(NET) else []
        for name in names:
            with contextlib.suppress(OSError):
                if os.path.exists(f"{NET}/{name}/device"):
                    with open(f"{NET}/{name}/address", encoding="ascii") as file:
                        found.add(file.read(64).strip())
        return tuple(sorted(found - {"", "00:00:00:00:00:00"}))

    @cached_property
    def _memory_mib(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20

    @cached_property
    def _cpu_model(self) -> str:
        first = procfs.read_text("/proc/cpuinfo").partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        fields = {name.strip(): value.strip() for name, _, value in pairs}
        present = [fields[name] for name in CPU_FIELDS if name in fields]
        return " ".join(present) or os.uname().machine


def file_system(path: str) -> str:
    """The type of the file system of an existing path, e.g. `ext4`; empty if it is not listed."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    types = (mount.fs_type for mount in procfs.read_mounts() if mount.device == number)
    return next(types, "")
