"""Look for the VMMs that no record explains."""

from collections.abc import Mapping

from handlers.claims.unrecorded import TapOwner, UnrecordedVmm, VmmProcess
from handlers.interfaces import Host


async def look_for_unrecorded(host: Host) -> tuple[UnrecordedVmm, ...]:
    """Find them and book what they hold; returns them.

    A launch commits its uid before its VMM runs, and frees it after that has exited. So a process
    that was read first, and whose uid nobody has afterwards, is in no record; at most it has just
    ended, which the next look finds.
    """
    async with host.unrecorded.lock:
        base = host.settings.vmm.uid_base
        found = [each for each in await host.vmms.processes() if not explained(each, base, host)]
        owners: Mapping[str, TapOwner] = await host.taps.owners() if found else {}
        vmms = tuple(
            UnrecordedVmm(
                process, tuple(sorted(tap for tap, own in owners.items() if own.uid == process.uid))
            )
            for process in found
        )
        host.unrecorded.set(vmms)
        return vmms


def explained(process: VmmProcess, uid_base: int, host: Host) -> bool:
    """Whether an instance, a launch being reserved or the warm pool has the uid; or the process is
    in no jail and no cgroup of this hostd's: of another one on this machine, with the same range.
    """
    slot = process.uid - uid_base
    holder = host.records.with_slot(slot)  # its record may be one that cannot be read
    ours = f"{process.cgroup}/".startswith(f"{host.settings.limits.cgroup}/")
    if process.jail_id is None and not ours:
        return True
    return (
        (holder is not None and host.records.instance(holder) is not None)
        or slot in host.warm.slots
        or any(each.uid_slot == slot for each in host.pending_reservations.values())
    )
