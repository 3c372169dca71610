"""Removes one resource that carries hostd's mark, if nothing on this host uses it.

Who it belongs to is decided elsewhere (`worker/reconcile`); here is what the kernel says: a process
that has it open or is in it, a port, another name. What is used stays, with a Conflict.
"""

import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping

from handlers.claims.orphan import Orphan
from handlers.errors import Conflict, Invalid
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
        """Remove it; success if it is absent.

        Raises:
            Conflict: something uses it, or may; it is as it was.
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
            changed = await run_in_thread(newest_change_s, path)
            refuse_recent(path, changed or 0.0)
            await self._remove_snapshot(name)  # the guest's memory in it is discarded
        else:
            await run_in_thread(self._remove_file, path)

    def _remove_file(self, path: str) -> None:
        shared = split_tenant_path(self._paths.data, path)
        if shared is not None:
            # agentd's directory: by descriptor, without following what it may put there.
            tenant_id, below = shared
            directory, _, name = below.rpartition("/")
            with (
                open_tenant(self._paths.data, tenant_id) as tenant,
                tenant.directory(directory) as at,
            ):
                found = at.stat(name)
                if found is not None:
                    refuse_recent(path, max(found.st_mtime, found.st_ctime))
                    at.unlink(name)
            return
        if not path.startswith(f"{self._paths.state}/") or ".." in path.split("/"):
            raise Invalid(f"{path} is not below {self._paths.state}")
        newest = newest_change_s(path)
        if newest is None:
            return
        refuse_recent(path, newest)
        if os.path.isdir(path) and not os.path.islink(path):
            remove_path(path)
        else:
            os.unlink(path)


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


def refuse_recent(path: str, changed_s: float) -> None:
    if time.time() - changed_s < QUIET_S:
        raise Conflict(f"{path} changed within the last {QUIET_S:g} s")
