"""VMM processes: launched through the jailer, found again, identified and killed.

A VMM outlives the worker. Everything known about it comes from the kernel: the processes in its
jail's cgroup leaf, their root directory and executable. Nothing is signalled by name or bare pid.
These reads of /proc and of the cgroup tree are made on the event loop: they never wait for a disk,
and take less than the way to a thread and back.
`jails` makes the jail's files beforehand; this module only handles what the jailer makes.
"""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import chain
from typing import ClassVar

from handlers.cancellation import run_shielded
from handlers.claims.unrecorded import VmmProcess
from handlers.clock import now_ms
from handlers.errors import Conflict, Failure, HostFault, Unavailable
from handlers.host.jail.layout import JailLayout
from handlers.host.jail.sockets import connect, read_tail
from handlers.host.linux.file_id import FileId
from handlers.host.linux.file_threads import run_in_thread
from handlers.host.vmm import confinement, processes, survey
from handlers.host.vmm.api_client import VmmApi
from handlers.host.vmm.binaries import VmmBinaries
from handlers.host.vmm.cgroups import CgroupTree, oom_counts_of
from handlers.host.vmm.exit_watch import ExitStatuses, Newborn
from handlers.host.vmm.jailer import Jailer, clear
from handlers.host.vmm.migration import MigrationLock
from handlers.host.vmm.vmm_processes import list_vmm_processes
from handlers.jail_names import API_SOCKET, FIRECRACKER, LOG, PID_FILE
from handlers.mechanism import Durability
from handlers.specs import LaunchSpec
from handlers.vmm_ends import ExitStatus, end_of, failure_of
from schemas import naming
from schemas.records import VmmIdentity
from schemas.requests import InstanceRef
from schemas.settings import Settings

LOG_TAIL_BYTES = 4096
FIRST_POLL_S, LAST_POLL_S = 0.0005, 0.05
BUSY_POLL_S = 0.004
KILL_TIMEOUT_S = 10.0
THREADS_TIMEOUT_S = 1.0


class Vmms:
    """Launches, finds and kills VMMs; the key is the jail ID, which is also the VMM's `--id`.

    Args:
        settings: where jails and cgroups are, and how VMMs are launched.
        layout: of the jails, if it is not that of instances.
        binaries: what launches execute; by default the pair of the settings.
        tenant_of: in whose cgroup a jail's leaf is; None if not known: then it is looked for.

    Source: docs/jailer.md of Firecracker, cgroups(7), pidfd_open(2).
    Needs: what the jailer needs, CAP_KILL and CAP_SYS_PTRACE.
    """

    name: ClassVar[str] = "vmm"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = True

    def __init__(
        self,
        settings: Settings,
        layout: JailLayout | None = None,
        *,
        binaries: VmmBinaries | None = None,
        tenant_of: Callable[[str], str | None] = lambda jail_id: None,
    ) -> None:
        self._settings = settings.vmm
        self._uids = range(settings.vmm.uid_base, settings.vmm.uid_base + settings.vmm.uid_count)
        self._next = 0
        self._layout = layout or JailLayout(settings.jail_base)
        self._tree = CgroupTree.of(settings)
        self._tenant_of = tenant_of
        self._binaries = binaries or VmmBinaries(settings)
        self._jailer = Jailer(settings, self._binaries)
        self._exits = ExitStatuses()
        self._migration = MigrationLock(self._tree.mount)

    def expect_launch(self) -> None:
        self._migration.prepare()

    async def version_for(self, wanted: str | None, *, reread: bool = True) -> str:
        return await self._binaries.version_for(wanted, reread=reread)

    # -- the mechanism -------------------------------------------------------------------------

    async def exists(self, key: str) -> bool:
        """Whether any process is in the jail's cgroup, a jailer that still runs included."""
        self._layout.root(key)
        return bool(self._pids(key))

    async def ensure(self, spec: LaunchSpec) -> VmmIdentity:
        """Launch the VMM, wait until its API listens, and prove which process it is.

        A live VMM of this jail is returned as it is. After a failure nothing that was started runs.

        Raises:
            HostFault: no cgroup leaf, no jail, the jailer or the VMM did not start; the jailer's
                output and the end of the VMM's log are in the detail.
            Conflict: a VMM of this jail runs under another uid or in another cgroup.
            Unavailable: the API did not listen within `[vmm] api_timeout_s`.
        """
        root = self._layout.root(spec.jail_id)
        pids = self._pids(spec.jail_id)
        found = self._find(spec.jail_id) if pids else None
        if found is not None and os.path.exists(f"{root}/{API_SOCKET}"):
            return self._check_matches(found, spec)
        if pids:
            await self.remove(spec.jail_id)
        try:
            return await self._launch(spec, root)
        except BaseException as error:
            if isinstance(error, Failure):
                error.detail.setdefault("vmm_log", read_tail(root, LOG, LOG_TAIL_BYTES))
            await run_shielded(self._abandon(spec.jail_id, root))
            raise

    async def remove(self, key: str) -> None:
        """SIGKILL every process of the jail, by pidfd and after its proof; wait until all are gone.

        Raises:
            HostFault: an unexpected process is in the jail's cgroup; it was not killed.
            Unavailable: a process did not exit in time.
        """
        root = self._layout.root(key)
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                # Repeated until none is left: a running jailer may have forked meanwhile, and a
                # kernel thread of KVM exits shortly after its VM.
                wait_s = FIRST_POLL_S
                killed: list[int] = []
                while pids := await run_in_thread(self._pids, key):
                    if pids == killed:
                        await asyncio.sleep(wait_s)
                        wait_s = min(wait_s * 2, LAST_POLL_S)
                    for pid in pids:
                        await self._kill(pid, key, root)
                    killed = pids
        except TimeoutError as error:
            raise Unavailable(
                f"VMM of jail {key} still running {KILL_TIMEOUT_S:g} s after SIGKILL",
                detail={"pids": self._pids(key)},
            ) from error

    # -- reading and signals -------------------------------------------------------------------

    async def launches(self, ref: InstanceRef) -> list[int]:
        return self._tree.launches(ref)

    def free_uid(self, taken: Callable[[int], bool], *, keep_turn: bool = False) -> int | None:
        for uid in self._next_uids():
            if not taken(uid) and not processes.is_listed(uid):
                if not keep_turn:
                    self._next = self._uids.index(uid) + 1
                return uid
        # Perhaps some have only zombies, which an init that reaps late leaves behind.
        used = processes.uids_in_use(self._uids)
        return next((uid for uid in self._uids if uid not in used and not taken(uid)), None)

    def _next_uids(self) -> Iterator[int]:
        """All, from the one after the last that was found free."""
        return chain(self._uids[self._next :], self._uids[: self._next])

    async def processes(self) -> list[VmmProcess]:
        return await run_in_thread(list_vmm_processes, self._uids, self._layout)

    async def find(self, jail_id: str) -> VmmIdentity | None:
        self._layout.root(jail_id)
        return self._find(jail_id)

    async def alive(self, identity: VmmIdentity) -> bool:
        with _proven(identity) as pidfd:
            return pidfd is not None

    async def lacking(self, vmms: Mapping[str, VmmIdentity]) -> Mapping[str, Sequence[str]]:
        jails = {self._layout.root(jail_id): jail_id for jail_id in vmms}
        named = {root: vmms[jail_id] for root, jail_id in jails.items()}
        found = await run_in_thread(survey.lacking, named)
        return {jails[root]: missing for root, missing in found.items()}

    async def wait_exit(self, identity: VmmIdentity, timeout_s: float) -> bool:
        with _proven(identity) as pidfd:
            if pidfd is not None and not await processes.wait_exit(pidfd, timeout_s):
                return False
            if pidfd is not None:
                self._exits.note(identity, pidfd)
            return True

    async def exit_status(self, identity: VmmIdentity) -> ExitStatus:
        return self._exits.of(identity)

    async def check_confinement(self, identity: VmmIdentity, spec: LaunchSpec) -> None:
        root = self._layout.root(spec.jail_id)
        with _proven(identity) as pidfd:
            if pidfd is None:
                raise Unavailable(f"VMM of jail {spec.jail_id} is gone")
            try:
                confinement.check_process(
                    identity.pid,
                    uid=spec.uid,
                    cgroup=spec.cgroup,
                    root=root,
                    file_bytes=self._settings.max_file_mib << 20,
                )
                await self._check_threads(identity.pid)
            except (OSError, KeyError) as error:
                raise Unavailable(f"VMM of jail {spec.jail_id} exited during the check") from error
            # What was read belongs to this process only if it still lives.
            if processes.has_exited(pidfd):
                raise Unavailable(f"VMM of jail {spec.jail_id} exited during the check")

    async def _check_threads(self, pid: int) -> None:
        """Retry for a moment: a vCPU thread may not have started yet."""
        until = time.monotonic() + THREADS_TIMEOUT_S
        while True:
            try:
                return confinement.check_threads(pid)
            except HostFault:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(FIRST_POLL_S)

    def api(self, jail_id: str) -> VmmApi:
        return VmmApi(
            self._layout.root(jail_id),
            timeout_s=self._settings.api_timeout_s,
            snapshot_timeout_s=self._settings.snapshot_timeout_s,
        )

    # -- launching -----------------------------------------------------------------------------

    async def _launch(self, spec: LaunchSpec, root: str) -> VmmIdentity:
        with (
            os.fdopen(os.memfd_create("jailer", os.MFD_CLOEXEC), "w+b") as jailer_output,
            contextlib.closing(Newborn()) as born,
        ):
            try:
                async with asyncio.timeout(self._settings.api_timeout_s):
                    await self._jailer.run(spec, root, jailer_output.fileno())
                    # The rest takes 1 to 2 ms, too short for the event loop's timers, which have a
                    # resolution of 1 ms. No inotify: closing one costs 10 ms.
                    identity = await run_in_thread(self._poll_launched, spec, root, born)
                    wait_s = FIRST_POLL_S
                    while identity is None:
                        await asyncio.sleep(wait_s)
                        wait_s = min(wait_s * 1.5, LAST_POLL_S)
                        identity = self._launched(spec, root, born)
            except TimeoutError as error:
                raise Unavailable(
                    f"the API of jail {spec.jail_id} did not listen within "
                    f"{self._settings.api_timeout_s:g} s"
                ) from error
        return identity

    def _poll_launched(self, spec: LaunchSpec, root: str, born: Newborn) -> VmmIdentity | None:
        """Look in full once the VMM has made its socket, and at once if it has exited."""
        until = time.monotonic() + BUSY_POLL_S
        while (identity := self._launched(spec, root, born)) is None and time.monotonic() < until:
            time.sleep(FIRST_POLL_S / 2)
            while not (
                os.path.lexists(f"{root}/{API_SOCKET}")
                or born.has_exited
                or time.monotonic() > until
            ):
                time.sleep(FIRST_POLL_S / 2)
        return identity

    def _launched(self, spec: LaunchSpec, root: str, born: Newborn) -> VmmIdentity | None:
        """The VMM, once its pid file is written and its API listens; None until then.

        The pid file alone proves nothing, as the VMM can write to the directory: the cgroup shows
        which processes are in the jail, the socket's peer credentials which one listens.
        """
        pids = self._tree.pids(spec.cgroup)
        if not pids:
            raise self._exited(spec, root, born.status())
        born.see(pids)
        written = read_tail(root, PID_FILE, 16)
        if not (written.isascii() and written.isdigit()) or int(written) not in pids:
            return None
        try:
            with connect(root, API_SOCKET) as api:
                listener = _peer_pid(api)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        identity = self._find(spec.jail_id, (spec.cgroup,))
        if identity is None or identity.pid != int(written) or identity.pid != listener:
            raise HostFault(
                f"the API socket of jail {spec.jail_id} is not served by the VMM in its cgroup: "
                f"process {listener} listens, expected one of {pids}",
                detail={"listener": listener, "pids": pids},
            )
        return identity

    def _exited(self, spec: LaunchSpec, root: str, status: ExitStatus) -> Failure:
        """The failure of a launch whose VMM ended before its API listened."""
        log = read_tail(root, LOG, LOG_TAIL_BYTES)
        oom = oom_counts_of(self._tree.path(spec.cgroup))
        warm = naming.WARM_ID_PATTERN.fullmatch(spec.jail_id)
        launch = 0 if warm else int(spec.jail_id.rpartition("-")[2])
        end = end_of(status, oom, log.encode(), launch=launch, at_ms=now_ms())
        return failure_of(HostFault(f"VMM of jail {spec.jail_id} exited during startup"), end)

    def _check_matches(self, found: VmmIdentity, spec: LaunchSpec) -> VmmIdentity:
        uid = confinement.read_uid(found.pid)
        if found.cgroup != spec.cgroup or uid != spec.uid:
            raise Conflict(
                f"a VMM of jail {spec.jail_id} already runs as uid {uid} in {found.cgroup}: "
                f"expected uid {spec.uid} in {spec.cgroup}",
                detail={"uid": uid, "cgroup": found.cgroup},
            )
        return found

    async def _abandon(self, jail_id: str, root: str) -> None:
        """After a failed launch: kill what runs and restore the jail, except for the log."""
        await self.remove(jail_id)
        await run_in_thread(clear, root)

    # -- proof ---------------------------------------------------------------------------------

    def _leaves(self, jail_id: str) -> Iterator[str]:
        return self._tree.leaves(jail_id, self._tenant_of(jail_id))

    def _pids(self, jail_id: str) -> list[int]:
        return [pid for leaf in self._leaves(jail_id) for pid in self._tree.pids(leaf)]

    def _find(self, jail_id: str, leaves: tuple[str, ...] | None = None) -> VmmIdentity | None:
        """The process in the jail's leaf whose root and executable are the jail's own."""
        root = self._layout.root(jail_id)
        jail, copy = FileId.at(root), FileId.at(f"{root}/{FIRECRACKER}")
        for leaf in leaves if leaves is not None else self._leaves(jail_id):
            for pid in self._tree.pids(leaf):
                identity = processes.read_identity(pid)
                if identity is None or identity.cgroup != leaf or jail is None:
                    continue
                executable = FileId(identity.exe_dev, identity.exe_ino)
                if executable == copy and FileId.at(f"/proc/{pid}/root") == jail:
                    return identity
        return None

    async def _kill(self, pid: int, jail_id: str, root: str) -> None:
        """Kill one process of the leaf, if it is the VMM or the jailer."""
        pidfd = processes.open_pidfd(pid)
        if pidfd is None:
            return
        try:
            cgroup = processes.read_cgroup(pid)
            executable = FileId.at(f"/proc/{pid}/exe")
            if executable is None or processes.has_exited(pidfd):
                return
            ours = {FileId.at(f"{root}/{FIRECRACKER}"), *self._binaries.files()}
            # If an operator removed the jail's files, the uid still identifies its processes.
            jailed = (confinement.read_uid(pid) or 0) in self._uids
            if cgroup not in set(self._leaves(jail_id)) or not (executable in ours or jailed):
                raise HostFault(
                    f"unexpected process {pid} in the cgroup of jail {jail_id}; not killed",
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
    """The pid that called listen(2) on the other end. Source: unix(7), SO_PEERCRED."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("=3i", raw)[0])
