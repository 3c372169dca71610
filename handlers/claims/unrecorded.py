"""VMMs that run on this host and that no record explains. They are never killed.

What they hold is booked, so that no command collides with it: the uid (as every live process's),
the memory, the address (of the TAPs that belong to the uid), and the jail ID. They are looked for
when the worker starts, in every pass of the reconciler, after a release or adoption, and, while
there is one, before a launch.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from schemas import naming
from schemas.records import Usage
from schemas.requests import InstanceRef


@dataclass(frozen=True, slots=True)
class VmmProcess:
    """A live process that has a uid of `[vmm]`. `jail_id`: the jail that is its root directory;
    `size_mib`: of its address space, the guest's memory included."""

    pid: int
    start_ticks: int
    uid: int
    jail_id: str | None
    cgroup: str
    size_mib: int


@dataclass(frozen=True, slots=True)
class TapOwner:
    """Whose a TAP is: the instance `t/p/i` of its alias, and the uid that may open it."""

    instance: str
    uid: int


@dataclass(frozen=True, slots=True)
class UnrecordedVmm:
    """One, with the TAPs that its uid may open."""

    process: VmmProcess
    taps: tuple[str, ...] = ()

    def as_map(self) -> dict[str, object]:
        """For answers and events."""
        process = self.process
        return {
            "pid": process.pid,
            "uid": process.uid,
            "jail": process.jail_id,
            "cgroup": process.cgroup,
            "mem_mib": process.size_mib,
            "taps": list(self.taps),
        }


class UnrecordedVmms:
    """Those found by the last look; `handlers/claims/look.py` looks."""

    def __init__(self) -> None:
        self.vmms: tuple[UnrecordedVmm, ...] = ()
        self.lock = asyncio.Lock()

    def set(self, vmms: Iterable[UnrecordedVmm]) -> None:
        self.vmms = tuple(vmms)

    @property
    def usage(self) -> Usage:
        """What they take of the host: their memory; the overhead of a VMM is in it."""
        return Usage(mem_mib=sum(each.process.size_mib for each in self.vmms))

    def with_tap(self, tap: str) -> UnrecordedVmm | None:
        """The one that has the TAP, and so its address."""
        return next((each for each in self.vmms if tap in each.taps), None)

    def of_instance(self, ref: InstanceRef) -> UnrecordedVmm | None:
        """The one that runs in a jail of the instance."""
        prefix = naming.jail_id_prefix(ref)
        return next(
            (each for each in self.vmms if (each.process.jail_id or "").startswith(prefix)), None
        )
