"""A host for `plan.py`: reads reach the real one, every effect is predicted instead of made.

The handlers, their admission and their steps are the real ones. What is replaced is listed here
per interface of `handlers/interfaces.py`: a method is a read, by name, or it is predicted; one
that is neither raises. `tests/unit/instance/test_explain.py` holds that the lists are complete.
"""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Final

from handlers.claims.unrecorded import UnrecordedVmms
from handlers.concurrency import FairSlots, Slots
from handlers.control import Control
from handlers.explain.predicted import PlannedApi, PlannedRecords, sealed
from handlers.interfaces import Discarded, Host
from handlers.specs import (
    MIB,
    Ack,
    Artifact,
    DataDisk,
    DataDiskSpec,
    Jail,
    JailSpec,
    LaunchSpec,
    Restored,
)
from handlers.tenant_locks import TenantLocks
from schemas.records import DiskIdentity, VmmIdentity

MECHANISM: Final = ("name", "durability", "swept")


@dataclass(slots=True)
class Seen:
    """What planning met: by step its resource and whether that is there now, and waits."""

    found: dict[str, tuple[str, bool]] = field(default_factory=dict[str, tuple[str, bool]])
    waits: list[str] = field(default_factory=list[str])
    there: dict[tuple[str, str], bool] = field(default_factory=dict[tuple[str, str], bool])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    launched: set[str] = field(default_factory=set[str])


class ReadOnly:
    """One interface: `reads` are the real one's, all else is predicted."""

    def __init__(
        self, real: object, reads: Collection[str], **predicted: Callable[..., object]
    ) -> None:
        self.real = real
        self.reads = frozenset(reads)
        self.predicted = predicted

    def __getattr__(self, name: str) -> Any:
        if name in self.predicted:
            return self.predicted[name]
        if name in self.reads:
            return getattr(self.real, name)
        raise AttributeError(f"{type(self.real).__name__}.{name} is neither a read nor predicted")


class _Slots(FairSlots):
    """Says whether a command would wait; takes nothing."""

    def __init__(self, real: FairSlots, kind: str, seen: Seen) -> None:
        super().__init__(real.count)
        self._real, self._kind, self._seen = real, kind, seen

    def available(self, tenant_id: str) -> bool:
        return self._real.available(tenant_id)

    async def acquire(self, tenant_id: str) -> None:
        if not self._real.available(tenant_id):
            self._seen.waits.append(f"a slot of {self._kind}")

    def release(self, tenant_id: str) -> None:
        pass


class _Locks(TenantLocks):
    """Says which locks a command would wait for; takes none."""

    def __init__(self, real: TenantLocks, seen: Seen) -> None:
        super().__init__()
        self._real, self._seen = real, seen

    @asynccontextmanager
    async def _lock(
        self,
        key: str,
        control: Control | None,  # noqa: ARG002 - nothing is waited for
        *,
        exclusive: bool,
    ) -> AsyncGenerator[None]:
        held, waiting = self._real.states().get(key, (0, 0))
        if waiting or held < 0 or (exclusive and held):
            whose = f"the network lock of {key}" if key else "the lock of net ids and subnets"
            self._seen.waits.append(whose)
        yield


def readonly_host(host: Host, seen: Seen) -> Host:
    """The host with every effect predicted."""
    slots = {each.name: _Slots(getattr(host.slots, each.name), each.name, seen)
             for each in fields(Slots)}  # fmt: skip
    unrecorded = UnrecordedVmms()
    unrecorded.set(host.unrecorded.vmms)
    return dataclasses.replace(
        host,
        locks=_Locks(host.locks, seen),
        slots=Slots(**slots),
        records=PlannedRecords.over(host.records, ReadOnly),
        shared=_shared(host),
        networks=_networks(host),
        bridges=_mechanism(host.bridges, seen, _changed),
        tenant_rules=_mechanism(host.tenant_rules, seen, _changed),
        pins=_mechanism(host.pins, seen, _changed),
        taps=_taps(host, seen),
        artifacts=_mechanism(
            host.artifacts,
            seen,
            lambda _, __: Artifact("", "", None, {}),
            ("size_of_import", "imported"),
        ),
        data_disks=_data_disks(host, seen),
        cgroups=_mechanism(
            host.cgroups,
            seen,
            _nothing,
            ("oom_counts", "differing", "usage"),
            restore=_later(Restored()),
        ),
        jails=_mechanism(
            host.jails,
            seen,
            _jail,
            ("launches", "read_log", "metadata"),
            set_released=_later(None),
        ),
        vmms=_vmms(host, seen),
        warm=_warm(host),
        agents=_agents(host),
        snapshots=_snapshots(host),
        later=_not_later,
        pending_reservations=dict(host.pending_reservations),
        disk_claims=set(host.disk_claims),
        unrecorded=unrecorded,
        seen_alive=dict(host.seen_alive),
    )


# -- predictions -----------------------------------------------------------------------------------


def _later(value: object) -> Callable[..., Awaitable[object]]:
    """An effect that only has a result."""

    async def effect(*_: object, **__: object) -> object:
        return value

    return effect


def _not_later(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Nothing is begun."""


def _unfit(_free_mib: int) -> None:
    """No idle VMM is removed."""


def _nothing(_spec: object, _existed: bool) -> None:
    return None


def _changed(_spec: object, existed: bool) -> bool:
    """Whether it has to be made; what is there but differs is repaired in the same step."""
    return not existed


def _jail(spec: JailSpec, _existed: bool) -> Jail:
    has_secrets = spec.secrets is not None or spec.kept_secrets is not None
    return Jail("", has_config=True, has_secrets=has_secrets)


def _mechanism(
    real: Any,
    seen: Seen,
    made: Callable[[Any, bool], object],
    reads: Collection[str] = (),
    **predicted: Callable[..., object],
) -> Any:
    """A mechanism whose resources are looked for, and then taken as made or removed."""
    kind: str = real.name

    async def exists(key: str) -> bool:
        known = seen.there.get((kind, key))
        found: bool = await real.exists(key) if known is None else known
        return found

    async def ensure(spec: Any) -> object:
        existed = await exists(spec.key)
        seen.found.setdefault(kind, (spec.key, existed))
        seen.there[kind, spec.key] = True
        return made(spec, existed)

    async def remove(key: str) -> None:
        seen.found[f"remove_{kind}"] = key, await exists(key)
        seen.there[kind, key] = False

    verbs: dict[str, Callable[..., object]] = {
        "exists": exists, "ensure": ensure, "remove": remove,
    }  # fmt: skip
    return ReadOnly(real, {*MECHANISM, *reads}, **(verbs | predicted))


def _taps(host: Host, seen: Seen) -> Any:
    taps = _mechanism(host.taps, seen, _changed, ("owners", "traffic"), settle=_later(None))
    taps.predicted["release"] = taps.remove
    return taps


def _data_disks(host: Host, seen: Seen) -> Any:
    def made(spec: DataDiskSpec, _existed: bool) -> DataDisk:
        identity = spec.known or DiskIdentity(0, 0, spec.size_mib * MIB)
        return DataDisk(host.data_disks.path(spec.ref), identity)

    reads = ("path", "unallocated_bytes", "prove", "check_wipe")
    return _mechanism(host.data_disks, seen, made, reads, wipe=_later(None))


def _vmms(host: Host, seen: Seen) -> Any:
    def made(spec: LaunchSpec, existed: bool) -> VmmIdentity:
        seen.versions[spec.jail_id] = spec.version
        if not existed:
            seen.launched.add(spec.jail_id)
        return VmmIdentity(0, 0, 0, 0, spec.cgroup, host.facts.boot_id())

    async def wait_exit(_identity: VmmIdentity, timeout_s: float) -> bool:
        if timeout_s == float("inf"):  # raced against what the guest does
            await asyncio.Event().wait()
        return True

    def api(jail_id: str) -> PlannedApi:
        state = "Not started" if jail_id in seen.launched else "Running"
        return PlannedApi(state, seen.versions.get(jail_id, ""))

    return _mechanism(
        host.vmms,
        seen,
        made,
        ("launches", "processes", "find", "alive", "lacking", "exit_status"),
        version_for=partial(host.vmms.version_for, reread=False),
        expect_launch=lambda: None,
        free_uid=partial(host.vmms.free_uid, keep_turn=True),
        wait_exit=wait_exit,
        check_confinement=_later(None),
        api=api,
    )


@dataclass(frozen=True)
class PlannedVmm:
    """A warm VMM that a launch would use."""

    jail_id: str

    async def enter(self) -> None:
        """It would."""


def _warm(host: Host) -> Any:
    claimed: set[str] = set()

    def claim(jail_id: str, version: str) -> int | None:
        slot = host.warm.ready_slot(version)
        if slot is not None:
            claimed.add(jail_id)
        return slot

    @asynccontextmanager
    async def used_by(spec: LaunchSpec) -> AsyncGenerator[PlannedVmm | None]:
        yield PlannedVmm(spec.jail_id) if spec.jail_id in claimed else None

    return ReadOnly(
        host.warm,
        ("slots", "ready_slot"),
        claim=claim,
        give_back=claimed.discard,
        launch=nullcontext,
        used_by=used_by,
        fit=_unfit,
    )


def _shared(host: Host) -> Any:
    reads = ("tenant", "pool", "instance", "instances", "of_launch", "of_start", "secrets")
    nothing = _later(None)
    return ReadOnly(
        host.shared,
        reads,
        prepare_update=nothing,
        update_instance=nothing,
        remove_instance=nothing,
    )


def _networks(host: Host) -> Any:
    reads = ("overlapping_route", "taps_on", "warnings", "damaged")
    return ReadOnly(host.networks, reads, flush_conntrack=_later(None), prepare=_later(False))


def _agents(host: Host) -> Any:
    answered = _later(Ack(True))
    return ReadOnly(
        host.agents,
        (),
        ping=_later(None),
        sleep_prep=answered,
        wake=answered,
        set_clock=_later(0.0),
    )


def _snapshots(host: Host) -> Any:
    effects = (
        "publish", "verify", "hash_memory", "restore_ownership", "mark_consumed", "delete",
        "delete_all",
    )  # fmt: skip
    return ReadOnly(
        host.snapshots,
        ("read", "is_hashed"),
        begin_write=_later(("", "")),
        seal=sealed,
        link=_later(("", "")),
        discard=_later(Discarded()),
        **dict.fromkeys(effects, _later(None)),
    )
