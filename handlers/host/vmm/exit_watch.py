"""Watch the exit of a VMM and read its exit status, though hostd is not its parent.

A daemonized VMM belongs to init, which may reap it at once or late. The kernel shows the status of
a zombie in `/proc/<pid>/stat`, to root, and from Linux 6.15 on that of a reaped process through a
pidfd that was opened before. Between them a status is lost only on an older kernel whose init reaps
first, or if the VMM was reaped before anyone watched it.
"""

import asyncio
import contextlib
import fcntl
import os
import struct
from collections.abc import Sequence

from handlers.host.linux.procfs import boot_id, read_text
from handlers.host.vmm import processes
from handlers.vmm_ends import ExitStatus
from schemas.records import VmmIdentity

EXIT_STATUS_WAIT_S = 0.25
KNOWN_MAX = 64
EXIT_CODE_FIELD = 52 - 3  # counted from the state, the first after the name
PIDFD_INFO_EXIT = 1 << 3
PIDFD_INFO_BYTES = 64
PIDFD_GET_INFO = (3 << 30) | (PIDFD_INFO_BYTES << 16) | (0xFF << 8) | 11


class ExitWatch:
    """Reports when a VMM exits, whichever process is its parent."""

    async def watch(self, identity: VmmIdentity) -> ExitStatus:
        """Return once the process has exited; immediately if it is gone already.

        Raises:
            HostFault: it lives, but its cgroup or executable has changed.
        """
        pidfd = processes.prove(identity)
        if pidfd is None:
            return self.left_by(identity)
        try:
            await processes.wait_exit(pidfd)
            return await self._how(identity, pidfd)
        finally:
            os.close(pidfd)

    def left_by(self, identity: VmmIdentity) -> ExitStatus:
        """The status of a process that was not watched, if it is a zombie still. Does not block."""
        return status_of(_zombie_status(identity))

    async def _how(self, identity: VmmIdentity, pidfd: int) -> ExitStatus:
        """It is a zombie until its parent reaps it; only then the pidfd has the status."""
        wait_s = 0.002
        until = asyncio.get_running_loop().time() + EXIT_STATUS_WAIT_S
        while True:
            wait_status = _zombie_status(identity)
            if wait_status is None:
                wait_status = read_exit_status(pidfd)
            if wait_status is not None or asyncio.get_running_loop().time() > until:
                return status_of(wait_status)
            await asyncio.sleep(wait_s)
            wait_s *= 2


class ExitStatuses:
    """The statuses of VMMs whose end a launch waited for, until it has failed by it."""

    def __init__(self) -> None:
        self._known: dict[VmmIdentity, ExitStatus] = {}

    def note(self, identity: VmmIdentity, pidfd: int) -> None:
        """It has just exited; its parent may reap it at any moment."""
        found = exit_status(identity.pid, pidfd)
        if found != ExitStatus():
            self._known[identity] = found
            while len(self._known) > KNOWN_MAX:
                del self._known[next(iter(self._known))]

    def of(self, identity: VmmIdentity) -> ExitStatus:
        return self._known.get(identity) or status_of(_zombie_status(identity))


class Newborn:
    """The process of a launch, held by a pidfd from when it is first seen in its cgroup."""

    def __init__(self) -> None:
        self._pid = 0
        self._pidfd: int | None = None
        self._closed = False

    def see(self, pids: Sequence[int]) -> None:
        """The jailer is in the cgroup too, until it has exited: the last one seen alone counts."""
        if len(pids) == 1 and pids[0] != self._pid:
            self._forget()
            self._pid, self._pidfd = pids[0], processes.open_pidfd(pids[0])
            if self._closed:  # meanwhile: this call was abandoned
                self._forget()

    @property
    def has_exited(self) -> bool:
        """Whether it has; false while it was not seen."""
        return self._pidfd is not None and processes.has_exited(self._pidfd)

    def status(self) -> ExitStatus:
        """How it exited; not known if it was never seen."""
        return ExitStatus() if self._pidfd is None else exit_status(self._pid, self._pidfd)

    def close(self) -> None:
        self._closed = True
        self._forget()

    def _forget(self) -> None:
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)


def exit_status(pid: int, pidfd: int) -> ExitStatus:
    """Of a process that has exited and is held by a pidfd: a zombie's, or a reaped one's."""
    wait_status = None
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = _stat(pid)
        if fields[0] in "ZX" and processes.has_exited(pidfd):
            wait_status = int(fields[EXIT_CODE_FIELD])
    return status_of(read_exit_status(pidfd) if wait_status is None else wait_status)


def status_of(wait_status: int | None) -> ExitStatus:
    """Of a status as waitpid(2) has it; None is not known."""
    if wait_status is None:
        return ExitStatus()
    if os.WIFSIGNALED(wait_status):
        return ExitStatus(signal=os.WTERMSIG(wait_status))
    return ExitStatus(code=os.WEXITSTATUS(wait_status))


def read_exit_status(pidfd: int) -> int | None:
    """The wait status of a process that was reaped, also by another; None if not known.

    Source: ioctl PIDFD_GET_INFO with PIDFD_INFO_EXIT of include/uapi/linux/pidfd.h, Linux >= 6.15.
    """
    info = bytearray(struct.pack("=Q", PIDFD_INFO_EXIT).ljust(PIDFD_INFO_BYTES, b"\0"))
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, status = struct.unpack_from("=Q", info)[0], struct.unpack_from("=i", info, 60)[0]
    return int(status) if mask & PIDFD_INFO_EXIT else None


def _stat(pid: int) -> list[str]:
    """The fields of `/proc/<pid>/stat` from the state on."""
    return read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _zombie_status(identity: VmmIdentity) -> int | None:
    """The wait status of a zombie; None if the process lives, is reaped, or is another by now.

    Source: proc_pid_stat(5), fields 3, 22 and 52. Needs: CAP_SYS_PTRACE.
    """
    if identity.boot_id != boot_id():
        return None
    try:
        fields = _stat(identity.pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] not in "ZX" or int(fields[19]) != identity.start_ticks:
        return None
    return int(fields[EXIT_CODE_FIELD])
