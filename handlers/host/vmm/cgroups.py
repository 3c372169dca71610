"""cgroup v2 leaves of VMMs: `<limits.cgroup>/<tenant>/<jail id>`, directly under the mount.

The leaf exists before the jailer runs: a jailer whose parent cgroup is missing silently stays where
it is. With `limits.enforce` off only the tree is made: it still serves identity and kill.
This module kills nothing: `vmms` owns the VMM in a leaf.
"""

import contextlib
import errno
import os
import re
import select
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from handlers.errors import Conflict, Failure, HostFault, Invalid, Unavailable, of_os_error
from handlers.host.linux.file_threads import run_in_thread
from handlers.host.linux.procfs import Mount, read_mounts, read_text
from handlers.host.vmm import cgroup_limits
from handlers.host.vmm.cgroup_limits import write
from handlers.mechanism import Durability
from handlers.specs import CgroupSpec, CgroupUsage, Restored
from handlers.vmm_ends import OomCounts
from schemas import naming
from schemas.requests import InstanceRef
from schemas.settings import Settings

CONTROLLERS = ("cpu", "memory", "pids")
EMPTY_TIMEOUT_S = 5.0
RMDIR_TIMEOUT_S = 2.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def find_mount(mounts: Iterable[Mount] | None = None) -> str:
    """The mount point of the cgroup2 tree, by default in this mount namespace. Source: cgroups(7).

    Raises:
        HostFault: no cgroup2 tree is mounted; mount one.
    """
    for mount in read_mounts() if mounts is None else mounts:
        if mount.fs_type == "cgroup2":
            return mount.mount_point
    raise HostFault("no cgroup2 file system is mounted on this host: mount one on /sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class CgroupTree:
    """hostd's part of the cgroup2 tree. `base` is relative to the mount, e.g. `hostd`."""

    mount: str
    base: str

    @classmethod
    def of(cls, settings: Settings) -> "CgroupTree":
        parts = settings.limits.cgroup.strip("/").split("/")
        if not all(NAME.fullmatch(part) for part in parts):
            raise Invalid(
                f"invalid [limits] cgroup: got {settings.limits.cgroup!r}, want a path relative to "
                "the cgroup2 mount, e.g. hostd"
            )
        return cls(find_mount(), "/".join(parts))

    def name(self, tenant_id: str, jail_id: str) -> str:
        """A leaf's path relative to the mount, as in `LaunchSpec.cgroup` and /proc."""
        return naming.cgroup_name(self.base, naming.cgroup_key(tenant_id, jail_id))

    def path(self, name: str) -> str:
        """The directory of a cgroup, given its path relative to the mount."""
        return f"{self.mount}/{name}"

    def leaves(self, jail_id: str, tenant_id: str | None = None) -> Iterator[str]:
        """The leaves of a jail, as paths relative to the mount; normally 0 or 1.

        Without its tenant, of which a jail ID is made, all tenants' cgroups are gone through.
        """
        try:
            tenants = os.listdir(self.path(self.base)) if tenant_id is None else [tenant_id]
        except FileNotFoundError:
            return
        for tenant in tenants:
            name = self.name(tenant, jail_id)
            if os.path.isdir(self.path(name)):
                yield name

    def launches(self, ref: InstanceRef) -> list[int]:
        """Launch numbers of an instance that have a leaf in its tenant's cgroup."""
        try:
            names = os.listdir(self.path(f"{self.base}/{ref.tenant_id}"))
        except FileNotFoundError:
            return []
        prefix = naming.jail_id_prefix(ref)
        return [
            int(name.removeprefix(prefix))
            for name in names
            if name.startswith(prefix) and naming.JAIL_ID_PATTERN.fullmatch(name)
        ]

    def pids(self, name: str) -> list[int]:
        """Live processes in a cgroup; empty if it does not exist.

        Zombies are not listed; a kernel thread of KVM for a VM (kvm-nx-lpage-recovery) is.
        """
        try:
            text = read_text(f"{self.path(name)}/cgroup.procs")
        except (FileNotFoundError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOENT, errno.ENODEV):
                return []
            raise
        return [int(pid) for pid in text.split() if pid != "0"]

    def move(self, pid: int, name: str) -> None:
        """Move a process with all its threads into a cgroup.

        Raises:
            OSError: ESRCH: it has exited; ENOENT: no such cgroup.
        """
        write(f"{self.path(name)}/cgroup.procs", str(pid))


def check_controllers(settings: Settings) -> None:
    """At start: check that limits can be enforced here, if `[limits] enforce` is set.

    Raises:
        HostFault: no cgroup2 tree, or a controller is missing; says what to set instead.
    """
    tree = CgroupTree.of(settings)
    if not settings.limits.enforce:
        return
    available = read_text(f"{tree.mount}/cgroup.controllers").split()
    if missing := [name for name in CONTROLLERS if name not in available]:
        raise HostFault(
            f"[limits] enforce = true requires the cgroup2 controllers {', '.join(missing)}, which "
            f"{tree.mount} does not have; on a development host set enforce = false and "
            "[host] production = false"
        )


class Cgroups:
    """Makes and removes leaves with their limits; the key is `<tenant>/<jail id>`.

    Source: Documentation/admin-guide/cgroup-v2.rst.
    Needs: CAP_SYS_ADMIN or ownership of the subtree.
    """

    name: ClassVar[str] = "cgroup"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        self.tree = CgroupTree.of(settings)
        self._enforce = settings.limits.enforce
        self._locks: dict[str, threading.Lock] = {}

    async def exists(self, key: str) -> bool:
        return os.path.isdir(self.tree.path(self._leaf(key)))

    async def ensure(self, spec: CgroupSpec) -> None:
        """Make the leaf, set its limits and read them back.

        Raises:
            HostFault: names the missing controller, or the limit that reads back differently.
        """
        await run_in_thread(self._ensure, spec)

    async def differing(self, specs: Sequence[CgroupSpec]) -> Mapping[str, Sequence[str]]:
        """By key, the limits that are not in effect; without enforcement there are none."""
        return await run_in_thread(self._differing, specs) if self._enforce else {}

    def _differing(self, specs: Sequence[CgroupSpec]) -> dict[str, Sequence[str]]:
        found: dict[str, Sequence[str]] = {}
        for spec in specs:
            with contextlib.suppress(OSError):  # its VMM ended, and the leaf with it
                if names := tuple(
                    cgroup_limits.differing(self.tree.path(self._leaf(spec.key)), spec)
                ):
                    found[spec.key] = names
        return found

    async def restore(self, spec: CgroupSpec) -> Restored:
        """Put the limits of a running VMM back in effect, without killing it.

        Raises:
            HostFault: names the limit that reads back differently.
        """

        def restore() -> Restored:
            try:
                return cgroup_limits.restore(self.tree.path(self._leaf(spec.key)), spec)
            except OSError as error:
                raise of_os_error(error, f"cannot restore cgroup {spec.key}") from error

        return await run_in_thread(restore) if self._enforce else Restored()

    async def remove(self, key: str) -> None:
        """Remove the leaf, and with the tenant's last leaf its directory. Kills nothing.

        Raises:
            Unavailable: a process is still in it.
        """
        await run_in_thread(self._remove, self._leaf(key))

    async def oom_counts(self, key: str) -> OomCounts | None:
        """What the OOM killer did in the leaf since it was made; None if nothing counts it: the
        leaf is gone, or has no memory controller.

        Source: cgroup-v2.rst, `memory.events`: `oom`, `oom_kill`.
        """
        return oom_counts_of(self.tree.path(self._leaf(key)))

    async def usage(self, key: str) -> CgroupUsage | None:
        """What the processes in the leaf have used since it was made; None if it is gone. It does
        not block.

        Source: cgroup-v2.rst, `cpu.stat` `usage_usec` (there without a controller too),
        `memory.current`, `memory.peak` (Linux 5.19).
        """
        leaf = self.tree.path(self._leaf(key))
        try:
            cpu = dict(line.split() for line in read_text(f"{leaf}/cpu.stat").splitlines())
            used_us = int(cpu["usage_usec"])
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return None
            raise of_os_error(error, f"cannot read the usage of cgroup {key}") from error
        return CgroupUsage(
            used_us, memory_of(leaf, "memory.current"), memory_of(leaf, "memory.peak")
        )

    async def remove_unused(self, name: str) -> None:
        """Remove a cgroup of hostd's tree, given its path relative to the mount, without waiting.

        Raises:
            Conflict: a process or another cgroup is in it; the kernel says so, nothing is changed.
            Invalid: it is not below `[limits] cgroup`.
        """
        parts = name.removeprefix(f"{self.tree.base}/").split("/")
        if not name.startswith(f"{self.tree.base}/") or not all(map(NAME.fullmatch, parts)):
            raise Invalid(f"cgroup {name} is not below {self.tree.base}")
        await run_in_thread(self._remove_unused, name, tenant_only=len(parts) == 1)

    def _remove_unused(self, name: str, *, tenant_only: bool) -> None:
        path = self.tree.path(name)
        with self._lock_of(f"{path}/leaf" if tenant_only else path):
            try:
                os.rmdir(path)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                    raise Conflict(f"a process or another cgroup is in cgroup {name}") from error
                raise of_os_error(error, f"cannot remove cgroup {name}") from error
            if not tenant_only:
                with contextlib.suppress(OSError):  # another leaf is in it
                    os.rmdir(os.path.dirname(path))

    def _leaf(self, key: str) -> str:
        tenant_id, _, jail_id = key.partition("/")
        if not (NAME.fullmatch(tenant_id) and NAME.fullmatch(jail_id)):
            raise Invalid(f"invalid cgroup key: got {key!r}, want <tenant>/<jail id>")
        return self.tree.name(tenant_id, jail_id)

    def _ensure(self, spec: CgroupSpec) -> None:
        leaf = self.tree.path(self._leaf(spec.key))
        made = False
        try:
            with self._lock_of(leaf):
                made = self._make(leaf)
            if self._enforce:
                cgroup_limits.apply(leaf, spec)
        except (Failure, OSError) as error:
            if made:
                self._remove(self._leaf(spec.key))
            if isinstance(error, OSError):
                raise of_os_error(error, f"cannot make cgroup {spec.key}") from error
            raise

    def _lock_of(self, leaf: str) -> threading.Lock:
        """One per tenant: removing its last leaf removes the directory that a new leaf needs."""
        return self._locks.setdefault(os.path.dirname(leaf), threading.Lock())

    def _make(self, leaf: str) -> bool:
        """Make leaf and parents; true if the leaf is new."""
        if self._enforce:
            self._enable_controllers(leaf)
        try:
            os.mkdir(leaf)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the tenant's first
            os.makedirs(leaf)
        return True

    def _enable_controllers(self, leaf: str) -> None:
        """Enable the controllers in each cgroup above the leaf; make the missing ones.

        A cgroup can only have enabled what those above it have, so mostly one is read.
        """
        with contextlib.suppress(FileNotFoundError):
            above = read_text(f"{os.path.dirname(leaf)}/cgroup.subtree_control")
            if set(CONTROLLERS) <= set(above.split()):
                return
        at = self.tree.mount
        for part in os.path.relpath(leaf, self.tree.mount).split("/"):
            available = read_text(f"{at}/cgroup.controllers").split()
            if missing := [name for name in CONTROLLERS if name not in available]:
                raise HostFault(
                    f"cgroup {at} does not have the controllers {', '.join(missing)}",
                    detail={"cgroup": at, "missing": missing},
                )
            enabled = read_text(f"{at}/cgroup.subtree_control").split()
            if wanted := [f"+{name}" for name in CONTROLLERS if name not in enabled]:
                self._enable(at, wanted)
            at = f"{at}/{part}"
            if at != leaf:
                os.makedirs(at, exist_ok=True)

    def _enable(self, at: str, controllers: list[str]) -> None:
        try:
            write(f"{at}/cgroup.subtree_control", " ".join(controllers))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            # The "no internal processes" rule; only an operator can move the processes.
            raise HostFault(
                f"cannot enable controllers in cgroup {at}: it contains processes, so limits "
                "cannot be set below it; set [limits] cgroup to one without processes",
                detail={"cgroup": at},
            ) from error

    def _remove(self, name: str) -> None:
        leaf = self.tree.path(name)
        try:
            self._wait_empty(name)
            with self._lock_of(leaf):
                _rmdir(leaf)
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(os.path.dirname(leaf))
        except OSError as error:
            # EBUSY of the tenant's directory: another leaf is in it.
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY) or os.path.exists(leaf):
                raise of_os_error(error, f"cannot remove cgroup {name}") from error

    def _wait_empty(self, name: str) -> None:
        """Wait for `populated 0`; the kernel reports a change as POLLPRI."""
        try:
            events = open(f"{self.tree.path(name)}/cgroup.events", "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            return
        with events:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            until = time.monotonic() + EMPTY_TIMEOUT_S
            while b"populated 0" not in events.read(4096):
                left = until - time.monotonic()
                if left <= 0:
                    pids = self.tree.pids(name)
                    raise Unavailable(
                        f"cgroup {name} still has processes after {EMPTY_TIMEOUT_S:g} s",
                        detail={"pids": pids[:16]},
                    )
                poll.poll(left * 1000)
                events.seek(0)


def _rmdir(path: str) -> None:
    """Remove a cgroup; EBUSY is usual for a moment after `populated 0`."""
    until = time.monotonic() + RMDIR_TIMEOUT_S
    wait_s = 0.001
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
        else:
            return
        time.sleep(wait_s)
        wait_s = min(wait_s * 2, 0.1)


def memory_of(leaf: str, name: str) -> int | None:
    """Without the controller, and without the file in an older kernel, None."""
    try:
        return int(read_text(f"{leaf}/{name}"))
    except OSError:
        return None


def oom_counts_of(path: str) -> OomCounts | None:
    """`Cgroups.oom_counts` of the leaf at this path."""
    try:
        text = read_text(f"{path}/memory.events")
    except (FileNotFoundError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOENT, errno.ENODEV):
            return None
        raise
    counts = dict(line.split() for line in text.splitlines())
    return OomCounts(limit_reached=int(counts["oom"]), killed=int(counts["oom_kill"]))
