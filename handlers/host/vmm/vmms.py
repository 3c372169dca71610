"""VMM processes: launched through the jailer, found again, proven and ended.

A VMM outlives the worker. What is known of it comes from the kernel: the processes in its jail's
cgroup leaf, their root directory and executable. Nothing is signalled by name or by a bare pid.
The jail's files are made beforehand by `jails`; here only what the jailer itself needs.
"""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Generator
from typing import ClassVar

from handlers.cancellation import run_shielded
from handlers.errors import Conflict, Failure, HostFault, Unavailable
from handlers.host.jail.layout import LOG
from handlers.host.jail.sockets import (
    API_SOCKET,
    PID_FILE,
    VMM_COPY,
    JailPaths,
    connect,
    read_tail,
)
from handlers.host.vmm import confinement, processes
from handlers.host.vmm.api_client import FirecrackerApi
from handlers.host.vmm.cgroups import CgroupTree
from handlers.host.vmm.jailer import Jailer, clear
from handlers.host.vmm.processes import FileIdentity
from handlers.interfaces import Vmm
from handlers.specs import LaunchSpec
from schemas.records import VmmIdentity
from schemas.settings import Settings

LOG_TAIL_BYTES = 4096
FIRST_LOOK_S, LAST_LOOK_S = 0.0005, 0.05
SOON_S = 0.004
KILL_TIMEOUT_S = 10.0
THREADS_TIMEOUT_S = 1.0


class Vmms:
    """Implements `Vmms`; `key` is the jail id, which is also the VMM's `--id`.

    Needs: what the jailer needs, CAP_KILL and CAP_SYS_PTRACE.
    """

    name: ClassVar[str] = "vmms"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.vmm
        self._uids = range(settings.vmm.uid_base, settings.vmm.uid_base + settings.vmm.uid_count)
        self._paths = JailPaths.of(settings)
        self._tree = CgroupTree.of(settings)
        self._jailer = Jailer(settings)

    # -- the mechanism -------------------------------------------------------------------------

    async def exists(self, key: str) -> bool:
        """Whether any process is left in the jail's cgroup, the jailer on its way included."""
        self._paths.root(key)
        return bool(await asyncio.to_thread(self._pids, key))

    async def ensure(self, spec: LaunchSpec) -> VmmIdentity:
        """Launch the VMM, wait until its API listens, and prove which process it is.

        A live VMM of this jail is found as asked. After a failure nothing that was started runs.

        Raises:
            HostFault: no cgroup leaf, no jail, the jailer or the VMM refused to start; its words
                and the end of the VMM's log are in the detail.
            Conflict: a VMM of this jail runs under another uid or in another cgroup.
            Unavailable: the API did not listen within `[vmm] api_timeout_s`.
        """
        root = self._paths.root(spec.jail_id)
        found, pids = await asyncio.to_thread(self._survey, spec.jail_id)
        if found is not None and os.path.exists(f"{root}/{API_SOCKET}"):
            return self._as_asked(found, spec)
        if pids:
            await self.remove(spec.jail_id)
        await asyncio.to_thread(self._jailer.prepare, spec, root)
        try:
            return await self._launch(spec, root)
        except BaseException as error:
            if isinstance(error, Failure):
                error.detail.setdefault("vmm_log", read_tail(root, LOG, LOG_TAIL_BYTES))
            await run_shielded(self._abandon(spec.jail_id, root))
            raise

    async def remove(self, key: str) -> None:
        """SIGKILL, by pidfd and after the proof, all that runs in the jail; wait until it is gone.

        Raises:
            HostFault: a process in the jail's cgroup is none of ours; it is left alone.
            Unavailable: a process did not end in time.
        """
        root = self._paths.root(key)
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                # Again until none is left: a jailer on its way may have forked meanwhile, and a
                # kernel thread of KVM goes a moment after its VM.
                wait_s = FIRST_LOOK_S
                while pids := await asyncio.to_thread(self._pids, key):
                    for pid in pids:
                        await self._kill(pid, key, root)
                    await asyncio.sleep(wait_s)
                    wait_s = min(wait_s * 2, LAST_LOOK_S)
        except TimeoutError as error:
            raise Unavailable(
                f"the VMM of jail {key} does not end", detail={"pids": self._pids(key)}
            ) from error

    # -- questions and signals -----------------------------------------------------------------

    async def find(self, jail_id: str) -> VmmIdentity | None:
        self._paths.root(jail_id)
        return await asyncio.to_thread(self._find, jail_id)

    async def alive(self, identity: VmmIdentity) -> bool:
        with _proven(identity) as pidfd:
            return pidfd is not None

    async def wait_exit(self, identity: VmmIdentity, timeout_s: float) -> bool:
        with _proven(identity) as pidfd:
            return pidfd is None or await processes.wait_exit(pidfd, timeout_s)

    async def terminate(self, identity: VmmIdentity) -> None:
        with _proven(identity) as pidfd:
            if pidfd is not None:
                processes.send(pidfd, signal.SIGTERM)

    async def check_confinement(self, identity: VmmIdentity, spec: LaunchSpec) -> None:
        root = self._paths.root(spec.jail_id)
        with _proven(identity) as pidfd:
            if pidfd is None:
                raise Unavailable(f"the VMM of jail {spec.jail_id} is gone")
            try:
                await asyncio.to_thread(
                    confinement.check_process,
                    identity.pid,
                    uid=spec.uid,
                    cgroup=spec.cgroup,
                    root=root,
                )
                await self._check_threads(identity.pid)
            except (OSError, KeyError) as error:
                raise Unavailable(f"the VMM of jail {spec.jail_id} went away") from error
            # What was read is of this process only if it lives still.
            if processes.has_exited(pidfd):
                raise Unavailable(f"the VMM of jail {spec.jail_id} went away")

    async def _check_threads(self, pid: int) -> None:
        """Look again for a moment: a vCPU thread may not have begun yet."""
        until = time.monotonic() + THREADS_TIMEOUT_S
        while True:
            try:
                return await asyncio.to_thread(confinement.check_threads, pid)
            except HostFault:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(FIRST_LOOK_S)

    def api(self, jail_id: str) -> Vmm:
        return FirecrackerApi(
            self._paths.root(jail_id),
            timeout_s=self._settings.api_timeout_s,
            snapshot_timeout_s=self._settings.snapshot_timeout_s,
        )

    # -- launching -----------------------------------------------------------------------------

    async def _launch(self, spec: LaunchSpec, root: str) -> VmmIdentity:
        with os.fdopen(os.memfd_create("jailer", os.MFD_CLOEXEC), "w+b") as words:
            try:
                async with asyncio.timeout(self._settings.api_timeout_s):
                    await self._jailer.run(spec, words.fileno())
                    # The rest takes a millisecond or two: too short for the loop's own clock, which
                    # counts in whole ones. No inotify: closing one costs ten.
                    identity = await asyncio.to_thread(self._soon_launched, spec, root)
                    wait_s = FIRST_LOOK_S
                    while identity is None:
                        await asyncio.sleep(wait_s)
                        wait_s = min(wait_s * 1.5, LAST_LOOK_S)
                        identity = self._launched(spec, root)
            except TimeoutError as error:
                raise Unavailable(
                    f"the API of jail {spec.jail_id} did not listen within "
                    f"{self._settings.api_timeout_s:g} s"
                ) from error
        return identity

    def _soon_launched(self, spec: LaunchSpec, root: str) -> VmmIdentity | None:
        until = time.monotonic() + SOON_S
        while (identity := self._launched(spec, root)) is None and time.monotonic() < until:
            time.sleep(FIRST_LOOK_S / 2)
        return identity

    def _launched(self, spec: LaunchSpec, root: str) -> VmmIdentity | None:
        """The VMM once its pid file is written and its API listens; None while on its way.

        The pid file alone proves nothing, as the directory is the VMM's own: the cgroup says who is
        in the jail, and the socket's peer who listens.
        """
        pids = self._tree.pids(spec.cgroup)
        if not pids:
            raise HostFault(f"the VMM of jail {spec.jail_id} ended as it started")
        written = read_tail(root, PID_FILE, 16)
        if not written.isdigit() or int(written) not in pids:
            return None
        try:
            with connect(root, API_SOCKET) as api:
                listener = _peer_pid(api)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        identity = self._find(spec.jail_id, (spec.cgroup,))
        if identity is None or identity.pid != int(written) or identity.pid != listener:
            raise HostFault(
                f"the API of jail {spec.jail_id} is not served by the VMM in its cgroup",
                detail={"listener": listener, "pids": pids},
            )
        return identity

    def _as_asked(self, found: VmmIdentity, spec: LaunchSpec) -> VmmIdentity:
        uid = confinement.read_uid(found.pid)
        if found.cgroup != spec.cgroup or uid != spec.uid:
            raise Conflict(
                f"a VMM of jail {spec.jail_id} runs as uid {uid} in {found.cgroup}",
                detail={"uid": uid, "cgroup": found.cgroup},
            )
        return found

    async def _abandon(self, jail_id: str, root: str) -> None:
        """After a failed launch: nothing runs and the jail is as before, but for the log."""
        await self.remove(jail_id)
        await asyncio.to_thread(clear, root)

    # -- proof ---------------------------------------------------------------------------------

    def _pids(self, jail_id: str) -> list[int]:
        return [pid for leaf in self._tree.leaves(jail_id) for pid in self._tree.pids(leaf)]

    def _survey(self, jail_id: str) -> tuple[VmmIdentity | None, list[int]]:
        return self._find(jail_id), self._pids(jail_id)

    def _find(self, jail_id: str, leaves: tuple[str, ...] | None = None) -> VmmIdentity | None:
        """The process in the jail's leaf whose root and executable are the jail's own."""
        root = self._paths.root(jail_id)
        jail, copy = FileIdentity.of(root), FileIdentity.of(f"{root}/{VMM_COPY}")
        for leaf in leaves if leaves is not None else self._tree.leaves(jail_id):
            for pid in self._tree.pids(leaf):
                identity = processes.read_identity(pid)
                if identity is None or identity.cgroup != leaf or jail is None:
                    continue
                executable = FileIdentity(identity.exe_dev, identity.exe_ino)
                if executable == copy and FileIdentity.of(f"/proc/{pid}/root") == jail:
                    return identity
        return None

    async def _kill(self, pid: int, jail_id: str, root: str) -> None:
        """Kill one process of the leaf if it is the VMM or the jailer on its way."""
        pidfd = processes.open_pidfd(pid)
        if pidfd is None:
            return
        try:
            cgroup = processes.read_cgroup(pid)
            executable = FileIdentity.of(f"/proc/{pid}/exe")
            if executable is None or processes.has_exited(pidfd):
                return
            ours = {
                FileIdentity.of(path)
                for path in (
                    f"{root}/{VMM_COPY}",
                    self._settings.jailer,
                    self._settings.firecracker,
                )
            }
            # A jail whose files an operator took away still has its uid.
            jailed = (confinement.read_uid(pid) or 0) in self._uids
            if cgroup not in set(self._tree.leaves(jail_id)) or not (executable in ours or jailed):
                raise HostFault(
                    f"process {pid} in the cgroup of jail {jail_id} is no VMM; it is left alone",
                    detail={"pid": pid, "cgroup": cgroup},
                )
            processes.send(pidfd, signal.SIGKILL)
            await processes.wait_exit(pidfd)
        finally:
            os.close(pidfd)


@contextlib.contextmanager
def _proven(identity: VmmIdentity) -> Generator[int | None]:
    pidfd = processes.prove(identity)
    try:
        yield pidfd
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _peer_pid(connection: socket.socket) -> int:
    """Who called listen(2) on the other end. Source: unix(7), SO_PEERCRED."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("=3i", raw)[0])
