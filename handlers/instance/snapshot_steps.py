"""Steps of Sleep and Wake that undo ends: status transition, drain, pause, snapshot draft, use."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, TypeVar

import structlog
from msgspec.structs import replace

from handlers.errors import Failure
from handlers.interfaces import Host
from handlers.mechanism import Durability
from handlers.specs import SnapshotFacts, SnapshotInfo, SnapshotKey
from schemas.naming import parse_ref
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef

log = structlog.get_logger()
WAKE_S: Final = 2.0  # a Stop that superseded the Sleep waits so long for a guest that is deaf

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TransitionSpec:
    """A transitional status of a running instance, e.g. draining."""

    command_id: str
    record: InstanceRecord
    status: Status
    now_ms: int

    @property
    def key(self) -> str:
        return str(self.record.ref)


class Transitions:
    """Transitional statuses of running instances. Undo restores the status of before."""

    name: ClassVar[str] = "transition"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = False

    def __init__(self, host: Host) -> None:
        self._host = host

    async def exists(self, key: str) -> bool:
        record = self._host.records.instance(parse_ref(key))
        return record is not None and record.before is not None

    async def ensure(self, spec: TransitionSpec) -> InstanceRecord:
        now = self._host.records.instance(spec.record.ref)
        base = now if now is not None else spec.record
        before = base.before if base.before is not None else replace(base, before=None)
        record = replace(
            base,
            status=spec.status,
            since_ms=spec.now_ms,
            command_id=spec.command_id,
            before=before,
        )
        await self._host.records.put_instance(record)
        return record

    async def remove(self, key: str) -> None:
        record = self._host.records.instance(parse_ref(key))
        if record is not None and record.before is not None:
            await self._host.records.put_instance(replace(record.before, before=None))


@dataclass(frozen=True, slots=True)
class DrainSpec(Generic[T]):
    """`ask` asks the guest agent to prepare for sleep."""

    ref: InstanceRef
    ask: Callable[[], Awaitable[T]]

    @property
    def key(self) -> str:
        return str(self.ref)


class Drains:
    """Guests whose agent was asked to prepare for sleep: they may have stopped their work and
    unmounted drives. Undo, after that of the pause, sends the agent the `Wake` that it waits for.
    """

    name: ClassVar[str] = "drain_guest"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = False

    def __init__(self, host: Host) -> None:
        self._host = host

    async def exists(self, key: str) -> bool:  # noqa: ARG002 - each run asks again
        return False

    async def ensure(self, spec: DrainSpec[T]) -> T:
        return await spec.ask()

    async def remove(self, key: str) -> None:
        """Wake the guest, if its VMM still runs. One that does not answer in time is only logged:
        what it makes of its drain is its own."""
        record = self._host.records.instance(parse_ref(key))
        if record is None or record.vmm is None or record.agent_port is None:
            return
        if not await self._host.vmms.alive(record.vmm):
            return
        try:
            await self._host.agents.wake(record.jail_id, record.agent_port, timeout_s=WAKE_S)
        except Failure as error:
            log.warning("guest.left_drained", instance=key, error=error)


@dataclass(frozen=True, slots=True)
class PauseSpec:
    jail_id: str

    @property
    def key(self) -> str:
        return self.jail_id


class Pauses:
    """Paused VMs. Undo resumes.

    Args:
        seen_running: the caller has just asked, and the lane is its own, so `exists` does not.
    """

    name: ClassVar[str] = "pause"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = False

    def __init__(self, host: Host, *, seen_running: bool = False) -> None:
        self._host = host
        self._seen_running = seen_running

    async def exists(self, key: str) -> bool:
        if self._seen_running:
            return False
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
        """Resume the VM, if its VMM still runs."""
        if await self._host.vmms.find(key) is None:
            return
        vmm = self._host.vmms.api(key)
        try:
            if await vmm.state() == "Paused":
                await vmm.resume()
        finally:
            await vmm.close()


@dataclass(frozen=True, slots=True)
class SnapshotDraftSpec:
    snapshot: SnapshotKey
    uid: int
    facts: SnapshotFacts

    @property
    def key(self) -> str:
        return str(self.snapshot)


class SnapshotDrafts:
    """Snapshots not published yet. A draft of an earlier run is never used."""

    name: ClassVar[str] = "snapshot_draft"
    durability: ClassVar[Durability] = Durability.DURABLE
    swept: ClassVar[bool] = False

    def __init__(self, host: Host) -> None:
        self._host = host

    async def exists(self, key: str) -> bool:  # noqa: ARG002 - always written again
        return False

    async def ensure(self, spec: SnapshotDraftSpec) -> SnapshotInfo:
        """Let the paused VMM write state and memory into its jail, then move and hash them."""
        record = self._host.records.instance(spec.snapshot.ref)
        jail_id = record.jail_id if record is not None else ""
        state_path, mem_path = await self._host.snapshots.begin_write(jail_id, spec.uid)
        vmm = self._host.vmms.api(jail_id)
        try:
            await vmm.create_snapshot(state_path, mem_path)
        finally:
            await vmm.close()
        return await self._host.snapshots.seal(jail_id, spec.facts)

    async def remove(self, key: str) -> None:
        snapshot = SnapshotKey.parse(key)
        await self._host.snapshots.delete(snapshot.ref, snapshot.number)


@dataclass(frozen=True, slots=True)
class SnapshotUseSpec:
    snapshot: SnapshotKey

    @property
    def key(self) -> str:
        return str(self.snapshot)


class SnapshotUses:
    """A snapshot that a wake links into its jail. Its row precedes the jail's, so that its undo
    follows the jail's: by then the hard links are gone, and owner and recorded identity of the
    files, which hard links and chown changed, can be restored."""

    name: ClassVar[str] = "snapshot_use"
    durability: ClassVar[Durability] = Durability.IMPLIED
    swept: ClassVar[bool] = True

    def __init__(self, host: Host) -> None:
        self._host = host

    async def exists(self, key: str) -> bool:  # noqa: ARG002 - each wake links it again
        return False

    async def ensure(self, spec: SnapshotUseSpec) -> None:
        """No effect: `link_snapshot` makes the hard links once the jail exists."""

    async def remove(self, key: str) -> None:
        snapshot = SnapshotKey.parse(key)
        await self._host.snapshots.restore_ownership(snapshot.ref, snapshot.number)
