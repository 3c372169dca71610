"""The limits of a cgroup v2 leaf: set, read back, compared, restored without killing anything.

Source: Documentation/admin-guide/cgroup-v2.rst. Needs: ownership of the leaf.
"""

import os

from handlers.errors import HostFault
from handlers.host.linux.procfs import read_text
from handlers.interfaces import CPU_PERIOD_US
from handlers.specs import CgroupSpec, Restored

MEMORY_MAX = "memory.max"


def limits_of(leaf: str, spec: CgroupSpec) -> dict[str, str]:
    """File name and value of each limit, as the kernel reads it back."""
    page = os.sysconf("SC_PAGESIZE")
    limits = {
        MEMORY_MAX: str(spec.memory_max_bytes // page * page),
        "memory.swap.max": "0",
        "cpu.max": f"{spec.cpu_quota_us} {CPU_PERIOD_US}",
        "pids.max": str(spec.pids_max),
    }
    if not os.path.exists(f"{leaf}/memory.swap.max") and not _has_swap():
        del limits["memory.swap.max"]
    return limits


def differing(leaf: str, spec: CgroupSpec) -> dict[str, str]:
    """Those of its limits that are not in effect, with the value that they should have.

    Raises:
        OSError: the leaf, or one of its controllers, is gone.
    """
    limits = limits_of(leaf, spec)
    return {
        name: limits[name] for name in limits if read_text(f"{leaf}/{name}").strip() != limits[name]
    }


def apply(leaf: str, spec: CgroupSpec) -> None:
    """Set what differs and read it back.

    Raises:
        HostFault: names the limit that reads back differently.
    """
    for name, value in differing(leaf, spec).items():
        _set(leaf, spec.key, name, value)


def restore(leaf: str, spec: CgroupSpec) -> Restored:
    """Set what differs, of a leaf whose VMM runs: except a `memory.max` below what is in use.

    The kernel would end the VMM to get there, though it did nothing wrong.

    Raises:
        HostFault: as `apply`.
    """
    repaired: list[str] = []
    lost: list[str] = []
    for name, value in differing(leaf, spec).items():
        if name == MEMORY_MAX and int(read_text(f"{leaf}/memory.current")) > int(value):
            lost.append(f"{name} (more than {value} bytes are in use)")
            continue
        _set(leaf, spec.key, name, value)
        repaired.append(name)
    return Restored(tuple(repaired), tuple(lost))


def write(path: str, value: str) -> None:
    """One write(2), as the kernel requires; no O_CREAT, so a missing file is ENOENT."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _set(leaf: str, key: str, name: str, value: str) -> None:
    path = f"{leaf}/{name}"
    write(path, value)
    if (found := read_text(path).strip()) != value:
        raise HostFault(
            f"{name} of cgroup {key} reads back as {found}, expected {value}",
            detail={"limit": name, "expected": value, "found": found},
        )


def _has_swap() -> bool:
    return len(read_text("/proc/swaps").splitlines()) > 1
