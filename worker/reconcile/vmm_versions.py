"""Announces what does not fit together: versions of Firecracker in use and those on this host.

A version that something runs or sleeps by can be removed from `[vmm] versions_dir`, changed, or
lost with the disk: that is announced when it happens, not when a Wake fails. Nothing is removed
here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Final, Protocol

import structlog
from msgspec.structs import replace

from handlers.errors import Failure
from handlers.interfaces import Host
from handlers.specs import VersionState
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef
from schemas.settings import VmmSettings
from worker.journal.journal import Journal
from worker.logs import facts_of

CHECK_S: Final = 10.0
Published = Callable[[Collection[InstanceRef]], Awaitable[Collection[str]]]
"""The versions of what sleeps or runs of other instances: `worker.main.versions_without_record`."""

log = structlog.get_logger()


class Binaries(Protocol):
    """The versions on this host; see `handlers/host/vmm/binaries.py`."""

    async def look(self) -> None: ...

    def states(self, counts: Mapping[tuple[str, str], int]) -> Sequence[VersionState]: ...

    async def read(self, vmm: VmmSettings, in_use: Collection[str]) -> Callable[[], None]: ...


class VmmVersions:
    """The versions of one worker.

    Args:
        binaries: what launches execute.
        journal: what runs and sleeps.
        changed: called when another version is in trouble, or none is any more.
        published: by which snapshots on disk were written.
    """

    def __init__(
        self,
        binaries: Binaries,
        journal: Journal,
        changed: Callable[[], None],
        published: Published,
    ) -> None:
        self._binaries, self._journal, self._changed = binaries, journal, changed
        self._published = published
        self._told: dict[str, str] = {}

    @property
    def trouble(self) -> Mapping[str, str]:
        """State by version of those in trouble: the host is degraded while there is one."""
        return self._told

    def states(self) -> Sequence[VersionState]:
        """Every version that is here or in use: as of the last look at the files, and commit."""
        return self._binaries.states(dict(self._journal.records.vmm_versions()))

    def summary(self) -> list[dict[str, Any]]:
        """`states` as JSON, for whoever looks after the host."""
        return [
            {
                "version": each.version,
                "state": each.state,
                "reason": each.reason,
                "starts": each.starts,
                "running": each.running,
                "sleeping": each.sleeping,
                "sha256": dict(each.sha256),
                "lacks": list(each.lacks),
            }
            for each in self.states()
        ]

    def facts(self) -> list[dict[str, Any]]:
        """What of `states` the host's state shows."""
        shown = ("version", "state", "starts", "running", "sleeping")
        return [{name: getattr(each, name) for name in shown} for each in self.states()]

    async def watch(self) -> None:
        """Until cancelled: look at files and records, and announce each change."""
        while True:
            await self.check()
            await asyncio.sleep(CHECK_S)

    async def check(self) -> None:
        """Look once; an event if what is in trouble has changed."""
        try:
            await self._binaries.look()
        except (Failure, OSError) as error:  # e.g. the directory's disk hangs
            log.warning("vmm.versions_unseen", **facts_of(error))
            return
        states = self.states()
        now = {each.version: each.state for each in states if each.in_trouble}
        if now == self._told:
            return
        in_use = {
            each.version: {"running": each.running, "sleeping": each.sleeping}
            for each in states
            if each.version in now
        }
        try:
            await self._journal.records.event(
                EventKind.VMM_VERSIONS, reason=reason_of(now), detail={"versions": in_use}
            )
        except Failure:  # cannot commit now: told at the next look
            return
        log.warning("vmm.versions_changed", trouble=now)
        self._told = now
        self._changed()

    async def reread(self, vmm: VmmSettings) -> Callable[[], None]:
        """Read settings and files again; what is returned puts them into effect.

        Raises:
            Failure: there is no version to start VMs with, or a program is none.
        """
        return await self._binaries.read(vmm, await in_use(self._journal, self._published))


async def in_use(journal: Journal, published: Published) -> set[str]:
    """The versions that instances run or sleep by, also those that sleep without a record, as after
    the journal was lost; "" is one that is not known, as while a record cannot be read."""
    versions = {version for version, _ in journal.records.vmm_versions()}
    if journal.quarantine.hides_records:
        versions.add("")
    known = {record.ref for record in journal.records.instances()}
    return versions | set(await published(known))


def reason_of(trouble: Mapping[str, str]) -> str:
    """What an event `vmm_versions` says."""
    if not trouble:
        return "all versions of Firecracker in use are installed"
    named = ", ".join(f"{version} is {state}" for version, state in sorted(trouble.items()))
    return f"Firecracker {named}"


async def record_version(record: InstanceRecord, host: Host, journal: Journal) -> None:
    """Write down the version of an instance whose record is from before hostd kept it.

    For the instance's lane, or before the lanes start: no command may change the record meanwhile.
    What is not a version is not written.
    """
    if record.vmm_version:
        return
    if record.status is Status.SLEEPING:
        info = await host.snapshots.read(record.ref)
        version = "" if info is None else info.vmm_version
    elif record.status is Status.RUNNING:
        vmm = host.vmms.api(record.jail_id)
        try:
            version = await vmm.version()
        finally:
            await vmm.close()
    else:
        return
    if version and journal.records.instance(record.ref) == record:
        await journal.records.put_instance(replace(record, vmm_version=version))
