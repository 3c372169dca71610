"""One idle VMM that was launched ahead: made, moved into the cgroup of a launch, removed.

It is launched by the same code as any VMM, in the cgroup `<[limits] cgroup>/warm_pool/<warm id>`
and in a jail without metadata. `warm_pool` decides when.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from handlers.cancellation import run_shielded
from handlers.errors import HostFault, Unavailable
from handlers.host.jail.warm_jails import WarmJails, WarmLayout
from handlers.host.linux.file_threads import run_in_thread
from handlers.host.vmm import confinement, processes
from handlers.host.vmm.binaries import VmmBinaries
from handlers.host.vmm.cgroups import Cgroups
from handlers.host.vmm.jailer import LaunchLog
from handlers.host.vmm.vmms import Vmms
from handlers.interfaces import CPU_PERIOD_US
from handlers.specs import MIB, CgroupSpec, LaunchSpec
from schemas import naming
from schemas.records import VmmIdentity
from schemas.settings import Settings

PIDS_PER_VMM = 64
END_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class WarmVmm:
    """`slot` is its uid's place in `[vmm] uid_base`, `version` Firecracker's. The holder closes
    `pidfd`."""

    warm_id: str
    slot: int
    uid: int
    identity: VmmIdentity
    pidfd: int
    version: str
    binaries: object


class WarmVmms:
    """Makes and removes warm VMMs. Needs: what `Vmms`, `Cgroups` and `WarmJails` need."""

    def __init__(self, settings: Settings, binaries: VmmBinaries | None = None) -> None:
        self._settings = settings
        self._binaries = binaries or VmmBinaries(settings)
        self._jails = WarmJails(settings.jail_base)
        layout = WarmLayout(settings.jail_base)
        self._vmms = Vmms(
            settings,
            layout,
            binaries=self._binaries,
            tenant_of=lambda warm_id: naming.WARM_CGROUP,
        )
        self._cgroups = Cgroups(settings)
        self._launches = LaunchLog(settings.paths.state)

    def free_slot(self, taken: Callable[[int], bool]) -> int | None:
        """A uid slot that no process has, if it is not the last one; `taken` are others'."""
        base = self._settings.vmm.uid_base
        uid = self._vmms.free_uid(lambda each: taken(each - base))
        if uid is None or self._vmms.free_uid(lambda e: e == uid or taken(e - base)) is None:
            return None
        return uid - base

    def binaries(self) -> object:
        """Another one, when a Start would execute other files than before."""
        return self._binaries.current()

    async def launch(self, warm_id: str, slot: int) -> WarmVmm:
        """Launch one with the uid of this slot and prove its identity.

        What a failure leaves is the caller's to `remove`.
        """
        uid = self._settings.vmm.uid_base + slot
        key = naming.cgroup_key(naming.WARM_CGROUP, warm_id)
        spec = LaunchSpec(
            jail_id=warm_id,
            uid=uid,
            cgroup=naming.cgroup_name(self._settings.limits.cgroup, key),
            version=await self._binaries.version_for(None),
        )
        binaries = self.binaries()
        await self._cgroups.ensure(
            CgroupSpec(
                tenant_id=naming.WARM_CGROUP,
                jail_id=warm_id,
                memory_max_bytes=self._settings.limits.vmm_overhead_mib * MIB,
                cpu_quota_us=CPU_PERIOD_US,
                pids_max=PIDS_PER_VMM,
            )
        )
        await run_in_thread(self._jails.make, warm_id, uid)
        identity = await self._vmms.ensure(spec)
        pidfd = _open(warm_id, identity)
        return WarmVmm(warm_id, slot, uid, identity, pidfd, spec.version, binaries)

    async def end(self, warm: WarmVmm) -> None:
        """Kill it, in whatever cgroup it is, and wait until it has exited.

        Raises:
            Unavailable: it does not exit.
        """
        processes.send(warm.pidfd, signal.SIGKILL)
        if not await processes.wait_exit(warm.pidfd, END_S):
            raise Unavailable(f"warm VMM {warm.warm_id} did not exit after SIGKILL")

    async def enter(self, warm: WarmVmm, spec: LaunchSpec) -> None:
        """Move it into the cgroup of the launch, which exists; it is killed if it is not as made.

        Its threads move with it. Writing to cgroup.procs takes some 10 ms, unless it was prepared
        (`migration`): the kernel waits for an RCU grace period. So callers do other work meanwhile.

        Raises:
            Failure, OSError: it was killed, or it had exited.
        """
        await run_shielded(run_in_thread(self._enter, warm, spec))

    def _enter(self, warm: WarmVmm, spec: LaunchSpec) -> None:
        pidfd = _open(warm.warm_id, warm.identity)
        try:
            self._launches.record(spec.jail_id, spec.uid)
            self._cgroups.tree.move(warm.identity.pid, spec.cgroup)
            # Its threads get seccomp filters when a guest starts: checked then, as of any VMM.
            confinement.check_process(
                warm.identity.pid,
                uid=spec.uid,
                cgroup=spec.cgroup,
                root=f"/proc/{warm.identity.pid}/root",  # `Vmms` proves it to be the jail's
                file_bytes=self._settings.vmm.max_file_mib << 20,
            )
        except BaseException:
            processes.send(pidfd, signal.SIGKILL)
            raise
        finally:
            os.close(pidfd)

    async def remove(self, warm_id: str) -> None:
        """Kill what is in its cgroup, after its proof, and remove jail and cgroup. Absent is
        success, so it also clears what a launch that took the VMM left of it."""
        await self._vmms.remove(warm_id)
        await run_in_thread(self._jails.remove, warm_id)
        await self._cgroups.remove(naming.cgroup_key(naming.WARM_CGROUP, warm_id))

    async def leftovers(self) -> list[str]:
        """IDs of every warm VMM of which this host has a jail or a cgroup."""
        return await run_in_thread(self._leftovers)

    def _leftovers(self) -> list[str]:
        tree = self._cgroups.tree
        with contextlib.suppress(FileNotFoundError):
            leaves = os.listdir(tree.path(f"{tree.base}/{naming.WARM_CGROUP}"))
            return sorted({*self._jails.list_ids(), *filter(_is_warm, leaves)})
        return self._jails.list_ids()


def _open(warm_id: str, identity: VmmIdentity) -> int:
    pidfd = processes.prove(identity)
    if pidfd is None:
        raise HostFault(f"warm VMM {warm_id} has exited")
    return pidfd


def _is_warm(name: str) -> bool:
    return naming.WARM_ID_PATTERN.fullmatch(name) is not None
