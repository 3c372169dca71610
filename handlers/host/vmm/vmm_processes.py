"""The processes that have a uid of `[vmm]`, whatever the journal says: a VMM cannot hide from it.

Source: proc_pid(5), proc_pid_status(5), proc_pid_root(5). Needs: CAP_SYS_PTRACE.
"""

import os

from handlers.claims.unrecorded import VmmProcess
from handlers.host.jail.layout import JailLayout
from handlers.host.linux.file_id import FileId
from handlers.host.linux.procfs import list_pids, read_status
from handlers.host.vmm.processes import read_cgroup, read_stat
from handlers.jail_names import jail_root

KIB_PER_MIB = 1024


def list_vmm_processes(uids: range, layout: JailLayout) -> list[VmmProcess]:
    """All live ones, by pid. Those that end meanwhile are left out; zombies are dead."""
    found = [each for pid in list_pids() if (each := _read(pid, uids)) is not None]
    if not found:
        return []
    roots = {
        root: jail_id
        for jail_id in layout.list_ids()
        if (root := FileId.at(jail_root(layout.jail_base, jail_id))) is not None
    }
    return [
        VmmProcess(
            pid=pid,
            start_ticks=start_ticks,
            uid=uid,
            jail_id=roots.get(root) if (root := _root(pid)) is not None else None,
            cgroup=read_cgroup(pid) or "",
            size_mib=size_mib,
        )
        for pid, start_ticks, uid, size_mib in found
    ]


def _read(pid: int, uids: range) -> tuple[int, int, int, int] | None:
    """Pid, start, real uid and size in MiB, rounded up. Root owns /proc/<pid> of a process that is
    not dumpable, so of those the status is read too."""
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
        if owner != 0 and owner not in uids:
            return None
        status = read_status(f"/proc/{pid}/status", ("Uid", "State", "VmSize"))
        uid = int(status["Uid"].split()[0])
        stat = read_stat(pid)
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None
    if uid not in uids or status["State"][0] in "ZX" or stat is None:
        return None
    size_kib = int(status.get("VmSize", "0 kB").split()[0])
    return pid, stat[1], uid, -(-size_kib // KIB_PER_MIB)


def _root(pid: int) -> FileId | None:
    try:
        return FileId.at(f"/proc/{pid}/root")
    except PermissionError:  # of another user namespace: in no jail of hostd's
        return None
