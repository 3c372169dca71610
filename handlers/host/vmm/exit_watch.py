"""Watch the exit of a VMM and read its exit status, though hostd is not its parent.

A daemonized VMM belongs to init, which may reap it at once or late. The kernel shows the status of
a zombie in `/proc/<pid>/stat`, to root, and from Linux 6.15 on that of a reaped process through a
pidfd that was opened before. Between them a status is lost only on an older kernel whose init reaps
first, or if the VMM was reaped before anyone watched it.
"""

import asyncio
import fcntl
import os
import struct

from handlers.host.linux.procfs import boot_id, read_text
from handlers.host.vmm import processes
from handlers.vmm_ends import ExitStatus
from schemas.records import VmmIdentity

EXIT_STATUS_WAIT_S = 0.25
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


def _zombie_status(identity: VmmIdentity) -> int | None:
    """The wait status of a zombie; None if the process lives, is reaped, or is another by now.

    Source: proc_pid_stat(5), fields 3, 22 and 52. Needs: CAP_SYS_PTRACE.
    """
    if identity.boot_id != boot_id():
        return None
    try:
        fields = read_text(f"/proc/{identity.pid}/stat").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] not in "ZX" or int(fields[19]) != identity.start_ticks:
        return None
    return int(fields[EXIT_CODE_FIELD])
