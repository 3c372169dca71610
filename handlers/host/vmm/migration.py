"""Begin early what a move into another cgroup waits for, as the jailer makes such a move.

A write to `cgroup.procs` takes a lock of the kernel whose readers, fork and exit, are kept cheap:
the first writer waits for an RCU grace period, some 10 ms, and then the kernel stays prepared for
writers during one more. So a write that changes nothing, made as soon as a launch is sure to come,
takes the wait off the jailer.

Source: percpu_down_write() and kernel/rcu/sync.c of Linux; docs/adr/0933.
"""

import contextlib
import os

from handlers.host.linux.file_threads import start_in_thread
from handlers.host.vmm.processes import read_cgroup


class MigrationLock:
    """The lock of one cgroup2 tree, which is mounted at `mount`."""

    def __init__(self, mount: str) -> None:
        self._mount = mount
        self._writing = False

    def prepare(self) -> None:
        """Have the kernel prepare for writers, in a thread. One at a time serves all launches.

        It never fails: what it does not do in time, the jailer waits for.
        """
        if not self._writing:
            self._writing = True
            if not start_in_thread(self._write):
                self._writing = False

    def _write(self) -> None:
        """Move this process to the cgroup that it is in."""
        try:
            with contextlib.suppress(OSError):
                own = read_cgroup(os.getpid()) or ""
                path = f"{self._mount}/{own}/cgroup.procs"
                fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, b"0")
                finally:
                    os.close(fd)
        finally:
            self._writing = False
