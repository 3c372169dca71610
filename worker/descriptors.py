"""Open descriptors of this process: the limit, raised at start, and a reserve below it."""

import os
import resource
from typing import Final

import structlog

from schemas.settings import Settings

ENOUGH: Final = 65_536  # more makes programs slow that close every possible descriptor
OF_WORKER: Final = 256  # journal, NATS, metrics, threads, reserve
OF_LAUNCH: Final = 16  # files and connections of one boot, restore, snapshot, import or network
OF_VM: Final = 3  # a pidfd, an API and an agent connection
SMALL_VM_MIB: Final = 128

log = structlog.get_logger()


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one, at most to `ENOUGH`; returns it.

    The default soft limit, 1024, is for programs with select(2); a worker with some hundred VMs,
    each with a pidfd, an API and an agent connection, needs more. The jailer sets the VMM's own.

    Source: getrlimit(2), systemd.exec(5) on LimitNOFILE.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    wanted = max(soft, ENOUGH if unlimited else min(hard, ENOUGH))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def needed(settings: Settings, memory_mib: int) -> int:
    """How many descriptors this host's settings and memory can make the worker open at once.

    `OF_WORKER`, `OF_LAUNCH` for each slot of `[limits]`, and `OF_VM` for each small VM that fits.
    """
    limits = settings.limits
    slots = limits.imports + limits.boots + limits.restores + limits.snapshots + limits.networks
    free_mib = max(0, memory_mib - limits.mem_reserve_mib)
    vms = min(settings.vmm.uid_count, free_mib // (SMALL_VM_MIB + limits.vmm_overhead_mib))
    return OF_WORKER + OF_LAUNCH * slots + OF_VM * vms


def check_limit(settings: Settings, memory_mib: int) -> None:
    """Log a warning if the limit in effect is below `needed`."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed(settings, memory_mib)
    if limit < wanted:
        log.warning(
            "descriptors.limit_low",
            limit=limit,
            needed=wanted,
            remedy=f"set LimitNOFILE of the unit to {wanted} or more",
        )


def in_use() -> tuple[int, int]:
    """How many descriptors are open, and the limit; the one that lists them is not counted."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return len(os.listdir("/proc/self/fd")) - 1, limit
    except OSError:  # none is left
        return limit, limit


class DescriptorReserve:
    """Descriptors kept open, to be closed when one is needed and none is free. Not thread-safe."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._held: list[int] = []
        self.refill()

    def release(self) -> bool:
        """Close one, so that the next open succeeds; false if none is left."""
        if not self._held:
            return False
        if len(self._held) == self._count:
            log.warning(
                "descriptors.exhausted", limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            )
        os.close(self._held.pop())
        return True

    def refill(self) -> bool:
        """Open what is missing, as far as possible; returns whether the reserve is complete."""
        while len(self._held) < self._count:
            if (fd := _opened()) is None:
                return False
            self._held.append(fd)
        return True

    def has_free(self) -> bool:
        """Whether the reserve is complete and one more descriptor can be opened."""
        if not self.refill() or (fd := _opened()) is None:
            return False
        os.close(fd)
        return True

    def close(self) -> None:
        while self._held:
            os.close(self._held.pop())


def _opened() -> int | None:
    try:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
