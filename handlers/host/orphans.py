"""Removes one resource that carries hostd's mark, if nothing on this host uses it.

Who it belongs to is decided elsewhere (`worker/reconcile`); here is what the kernel says: a process
that has it open or is in it, a port, another name. What is used stays, with a Conflict.
"""

import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping

from handlers.claims.orphan import Orphan
from handlers.errors import Conflict, Invalid, NotFound
from handlers.host.jail.jails import Jails
from handlers.host.linux.file_threads import run_in_thread
from handlers.host.linux.rmtree import remove_path
from handlers.host.net.host_network import NetworkMechanisms
from handlers.host.net.nft.unused_elements import remove_unused_element
from handlers.host.storage.agentd_files import open_tenant, split_tenant_path
from handlers.host.vmm.cgroups import Cgroups
from handlers.interfaces import Artifacts, Snapshots
from handlers.specs import SnapshotKey
from schemas import naming
from schemas.settings import PathSettings

SNAPSHOT = re.compile(r"[^/]+/[^/]+/[^/]+/[0-9]{1,18}")
QUIET_S = 60.0  # a temporary file that changed later may still be written


class OrphanRemoval:
    """One method per kind of the inventory that can be removed.

    Needs: what the mechanisms need, CAP_SYS_PTRACE.
    """

    def __init__(
        self,
        paths: PathSettings,
        network: NetworkMechanisms,
        cgroups: Cgroups,
        jails: Jails,
        artifacts: Artifacts,
        snapshots: Snapshots,
    ) -> None:
        self._paths = paths
        self._network = network
        self._snapshots = snapshots
        self._by_kind: Mapping[str, Callable[[str], Awaitable[None]]] = {
            "taps": network.taps.remove_unused,
            "bridges": network.bridges.remove_unused,
            "nft": self._remove_element,
            "cgroups": cgroups.remove_unused,
            "jails": jails.remove_unused,
            "snapshots": self._remove_snapshot,
            "artifacts": artifacts.remove,
            "temp": self._remove_temporary,
        }

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self._by_kind)

    async def remove(self, orphan: Orphan) -> None:
        """Remove it; success if it is absent, but for a temporary file.

        Raises:
            Conflict: something uses it, or may, or the temporary file is gone; all is as it was.
            Failure: it could not be removed.
        """
        if orphan.kind not in self._by_kind:
            raise Invalid(f"{orphan.kind} are not removed")
        await self._by_kind[orphan.kind](orphan.name)

    async def _remove_element(self, name: str) -> None:
        network = self._network
        await remove_unused_element(name, network.nft, network.base, network.netlink)

    async def _remove_snapshot(self, name: str) -> None:
        ref, _, number = name.rpartition("/")
        key = SnapshotKey(naming.parse_ref(ref), int(number))
        await self._snapshots.delete(key.ref, key.number)

    async def _remove_temporary(self, path: str) -> None:
        snapshots = f"{self._paths.state}/snapshots/"
        name = path.removeprefix(snapshots)
        if path.startswith(snapshots) and SNAPSHOT.fullmatch(name):
            if not all(map(naming.ID_PATTERN.fullmatch, name.split("/")[:3])):
                raise Conflict(f"{path} is not named as hostd names its snapshots: look at it")
            refuse_recent(path, await run_in_thread(newest_change_s, path))
            await self._remove_snapshot(name)  # the guest's memory in it is discarded
        else:
            await run_in_thread(self._remove_file, path)

    def _remove_file(self, path: str) -> None:
        shared = split_tenant_path(self._paths.data, path)
        if shared is not None:
            self._remove_shared(path, *shared)
            return
        if not path.startswith(f"{self._paths.state}/") or ".." in path.split("/"):
            raise Invalid(f"{path} is not below {self._paths.state}")
        refuse_recent(path, newest_change_s(path))
        if os.path.isdir(path) and not os.path.islink(path):
            remove_path(path)
        else:
            os.unlink(path)

    def _remove_shared(self, path: str, tenant_id: str, below: str) -> None:
        """In agentd's directory: by descriptor, without following what it may put there."""
        directory, _, name = below.rpartition("/")
        try:
            tenant = open_tenant(self._paths.data, tenant_id)
            with tenant, tenant.directory(directory) as at:
                found = at.stat(name)
                newest = None if found is None else max(found.st_mtime, found.st_ctime)
                refuse_recent(path, newest)
                at.unlink(name)
        except NotFound as error:
            raise Conflict(f"{path} is not there any more") from error


def newest_change_s(path: str) -> float | None:
    """When it, or anything in it, changed last, in Unix seconds; None if it is gone."""
    times: list[float] = []
    for at, _, names in os.walk(path):
        for each in (at, *(f"{at}/{name}" for name in names)):
            try:
                found = os.lstat(each)
            except FileNotFoundError:
                continue
            times.append(max(found.st_mtime, found.st_ctime))
    if not times:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return None
        times.append(max(found.st_mtime, found.st_ctime))
    return max(times)


def refuse_recent(path: str, changed_s: float | None) -> None:
    """Raises Conflict, also if it is gone: nothing is to be removed."""
    if changed_s is None:
        raise Conflict(f"{path} is not there any more")
    if time.time() - changed_s < QUIET_S:
        raise Conflict(f"{path} changed within the last {QUIET_S:g} s")
