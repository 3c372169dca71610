"""What Sleep and Wake do before their points of no return and can take back."""

from dataclasses import dataclass
from typing import ClassVar

from handlers.interfaces import Host
from handlers.specs import SnapshotFacts, SnapshotInfo
from schemas.naming import parse_ref
from schemas.requests import InstanceRef


@dataclass(frozen=True, slots=True)
class PauseSpec:
    jail_id: str

    @property
    def key(self) -> str:
        return self.jail_id


class Pauses:
    """Paused VMs. Undo resumes."""

    name: ClassVar[str] = "pause"

    def __init__(self, host: Host) -> None:
        self._host = host

    async def exists(self, key: str) -> bool:
        vmm = self._host.vmms.api(key)
        try:
            return await vmm.state() == "Paused"
        finally:
            await vmm.close()

    async def ensure(self, spec: PauseSpec) -> None:
        vmm = self._host.vmms.api(spec.jail_id)
        try:
            await vmm.pause()
        finally:
            await vmm.close()

    async def remove(self, key: str) -> None:
        """Resume; a VMM that is gone needs none."""
        if await self._host.vmms.find(key) is None:
            return
        vmm = self._host.vmms.api(key)
        try:
            if await vmm.state() == "Paused":
                await vmm.resume()
        finally:
            await vmm.close()


@dataclass(frozen=True, slots=True)
class Draft:
    """Names the snapshot of an instance that is being written."""

    ref: InstanceRef
    number: int

    @property
    def key(self) -> str:
        return f"{self.ref}#{self.number}"


@dataclass(frozen=True, slots=True)
class DraftSpec:
    draft: Draft
    uid: int
    facts: SnapshotFacts

    @property
    def key(self) -> str:
        return self.draft.key


class Drafts:
    """Snapshots not published yet. What an earlier run left of one is never used."""

    name: ClassVar[str] = "snapshot_draft"

    def __init__(self, host: Host) -> None:
        self._host = host

    async def exists(self, key: str) -> bool:  # noqa: ARG002 - a draft is always made anew
        return False

    async def ensure(self, spec: DraftSpec) -> SnapshotInfo:
        """Let the paused VMM write state and memory into its jail, then move and hash them."""
        record = self._host.records.instance(spec.draft.ref)
        jail_id = record.jail_id if record is not None else ""
        state_path, mem_path = await self._host.snapshots.begin_write(jail_id, spec.uid)
        vmm = self._host.vmms.api(jail_id)
        try:
            await vmm.create_snapshot(state_path, mem_path)
        finally:
            await vmm.close()
        return await self._host.snapshots.seal(jail_id, spec.facts)

    async def remove(self, key: str) -> None:
        ref, _, number = key.partition("#")
        await self._host.snapshots.delete(parse_ref(ref), int(number))


@dataclass(frozen=True, slots=True)
class SnapshotUseSpec:
    draft: Draft

    @property
    def key(self) -> str:
        return self.draft.key


class SnapshotUses:
    """A snapshot lent to a wake. Recorded before the jail, so that undo comes after the jail went:
    then owner and identity of the files are put right, since links and chown changed them."""

    name: ClassVar[str] = "snapshot_use"

    def __init__(self, host: Host) -> None:
        self._host = host

    async def exists(self, key: str) -> bool:  # noqa: ARG002 - each wake lends it anew
        return False

    async def ensure(self, spec: SnapshotUseSpec) -> None:
        """Nothing to do ahead: the links are made in the jail."""

    async def remove(self, key: str) -> None:
        ref, _, number = key.partition("#")
        await self._host.snapshots.restore_ownership(parse_ref(ref), int(number))
