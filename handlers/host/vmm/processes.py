"""Prove that a pid is still the VMM that was launched; signal it without hitting another process.

A pid alone proves nothing: it may belong to another process by now. So a pidfd is opened first and
then every field of `VmmIdentity` is compared; a pidfd never refers to another process. Signals go
through that pidfd only. A zombie counts as dead.
"""

import asyncio
import contextlib
import errno
import os
import select
import signal

from msgspec import to_builtins

from handlers.errors import HostFault
from handlers.host.linux.file_id import FileId
from handlers.host.linux.procfs import boot_id, list_pids, read_status, read_text
from schemas.records import VmmIdentity


def read_stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time in clock ticks since boot; None if there is no such process.

    Source: proc_pid_stat(5), fields 3 and 22; the name before them may contain blanks and brackets.
    """
    try:
        text = read_text(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def read_cgroup(pid: int) -> str | None:
    """Path in the cgroup2 tree without leading slash; None if there is no such process."""
    try:
        lines = read_text(f"/proc/{pid}/cgroup").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), None)


def is_listed(uid: int) -> bool:
    """Whether any process has this real uid, a zombie included. One lookup, however many there are.

    Source: getpriority(2): ESRCH if no process has the uid.
    """
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True


def uids_in_use(uids: range) -> set[int]:
    """Those of `uids` that are the real uid of a live process; zombies do not count.

    The owner of /proc/<pid> is the process's effective uid, except that it is root for a process
    that is not dumpable; only what seems to be root's or one of `uids` has its status read.

    Source: proc_pid(5), proc_pid_status(5).
    """
    found: set[int] = set()
    for pid in list_pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            owner = os.stat(f"/proc/{pid}").st_uid
            if owner == 0 or owner in uids:
                status = read_status(f"/proc/{pid}/status", ("Uid", "State"))
                uid = int(status["Uid"].split()[0])
                if uid in uids and status["State"][0] not in "ZX":
                    found.add(uid)
    return found


def read_identity(pid: int) -> VmmIdentity | None:
    """The identity of a live process; None if it is gone or a zombie.

    Needs: CAP_SYS_PTRACE for a process of another uid.
    """
    stat = read_stat(pid)
    exe = FileId.at(f"/proc/{pid}/exe")
    cgroup = read_cgroup(pid)
    if stat is None or stat[0] in "ZX" or exe is None or cgroup is None:
        return None
    return VmmIdentity(
        pid=pid,
        start_ticks=stat[1],
        exe_dev=exe.dev,
        exe_ino=exe.ino,
        cgroup=cgroup,
        boot_id=boot_id(),
    )


def open_pidfd(pid: int) -> int | None:
    """A pidfd (close-on-exec), or None if there is no such process. Source: pidfd_open(2).

    Of an ID that is a thread's, or of a process that is reaped just then, Linux says EINVAL, and
    ENOENT since 6.15 (kernel/fork.c, `pidfd_prepare`).
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
            raise
        return None


def prove(identity: VmmIdentity) -> int | None:
    """A pidfd of exactly this process, to be closed by the caller; None if it is gone.

    Gone includes: exited, a zombie, the pid taken by another process, another boot.

    Raises:
        HostFault: the process lives, but its cgroup or executable has changed; do not signal it.
    """
    if identity.boot_id != boot_id() or (pidfd := open_pidfd(identity.pid)) is None:
        return None
    with contextlib.ExitStack() as unless_proven:
        unless_proven.callback(os.close, pidfd)
        found = read_identity(identity.pid)
        if found is None or found.start_ticks != identity.start_ticks or has_exited(pidfd):
            return None
        if found != identity:
            raise HostFault(
                f"process {identity.pid} identity mismatch (cgroup or executable changed); "
                "not signalled",
                detail={"launched": to_builtins(identity), "found": to_builtins(found)},
            )
        unless_proven.pop_all()
    return pidfd


def has_exited(pidfd: int) -> bool:
    """Whether the process has exited (a zombie has), without waiting."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def send(pidfd: int, number: signal.Signals) -> None:
    """Signal the process of a pidfd; already gone is success.

    Source: pidfd_send_signal(2). Needs: CAP_KILL.
    """
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


async def wait_exit(pidfd: int, timeout_s: float | None = None) -> bool:
    """Wait on the event loop until the process exits; false if the time is up first.

    The caller keeps the pidfd, and must not wait for it twice at the same time.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True
