"""Instances, networks and tombstones (`handlers.interfaces.Records`), and the events they cause."""

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any, Final

import msgspec
from msgspec import to_builtins
from msgspec.structs import replace

from handlers.admission.ranking import Ranking
from handlers.errors import Conflict
from schemas.envelopes import EventKind
from schemas.records import (
    ABSENT,
    RELEASED,
    InstanceRecord,
    NetworkRecord,
    Status,
    Tombstone,
    Usage,
)
from schemas.requests import InstanceRef
from schemas.subjects import Lane
from schemas.usage import Metering, UsageDetail
from worker.journal.memory import Mirror
from worker.journal.store import Store
from worker.journal.transaction import OPERATOR, EventDraft, Transaction

TOMBSTONE_KEEP_MS: Final = 30 * 24 * 3_600_000
TOMBSTONES_MAX: Final = 20_000
PUT_INSTANCE: Final = (
    "INSERT INTO instance VALUES (?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (tenant_id, pool_id, instance_id) DO UPDATE SET "
    "uid_slot = excluded.uid_slot, address_offset = excluded.address_offset, "
    "record = excluded.record"
)
# Most puts change neither: to set a column writes the page of its index, also with the same value.
SAME_PLACES: Final = (
    "UPDATE instance SET record = ? WHERE tenant_id = ? AND pool_id = ? AND instance_id = ? "
    "AND uid_slot IS ? AND address_offset IS ?"
)


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a record: `save` it in a transaction, then `remember` it in memory."""

    save: Callable[[Transaction], None]
    remember: Callable[[], None]


class JournalRecords:
    """Reads from memory; a put is committed when it returns."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._expected: dict[str, NetworkRecord] = {}
        self._before: dict[str, NetworkRecord | None] = {}
        store.on_reload(self._reloaded)

    # -- instances -----------------------------------------------------------------------------

    def instance(self, ref: InstanceRef) -> InstanceRecord | None:
        return self._store.mirror.instances.get(ref)

    def instances(self, tenant_id: str | None = None) -> Sequence[InstanceRecord]:
        """All, or one tenant's."""
        instances = self._store.mirror.instances
        return tuple(instances.all() if tenant_id is None else instances.of(tenant_id))

    def usage(self, tenant_id: str | None = None) -> Usage:
        """Of all, or of one tenant's."""
        return self._store.mirror.instances.usage(tenant_id)

    def statuses(self) -> Mapping[Status, int]:
        """How many instances have each status."""
        return self._store.mirror.instances.statuses()

    def ranking(self, resource: str, tenant_id: str | None = None) -> Ranking:
        return self._store.mirror.instances.ranking(resource, tenant_id)

    def pools(self, tenant_id: str) -> Ranking:
        return self._store.mirror.instances.pools(tenant_id)

    def vmm_versions(self) -> Mapping[tuple[str, str], int]:
        return self._store.mirror.instances.vmm_versions()

    def held_uids(self) -> int:
        return self._store.mirror.instances.slot_count()

    def held_addresses(self) -> int:
        return self._store.mirror.instances.offset_count()

    def with_slot(self, slot: int) -> InstanceRef | None:
        return self._store.mirror.instances.with_slot(slot)

    def with_offset(self, tenant_id: str, offset: int) -> InstanceRecord | None:
        return self._store.mirror.instances.with_offset(tenant_id, offset)

    def refers(self, revision: str) -> bool:
        return self._store.mirror.instances.refers(revision)

    def tenant_of_jail(self, jail_id: str) -> str | None:
        return self._store.mirror.instances.tenant_of_jail(jail_id)

    async def put_instance(
        self,
        record: InstanceRecord,
        *,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        durable: bool = False,
    ) -> None:
        """Save; a changed status is published (event and state) in the same transaction.

        Raises:
            Conflict: another instance has the uid slot, or lives or sleeps with the offset.
        """
        await self._put(
            record, self.change_put(record, reason=reason, detail=detail), durable=durable
        )

    async def put_with_event(
        self,
        record: InstanceRecord,
        kind: EventKind,
        *,
        reason: str,
        detail: dict[str, Any] | None = None,
        actor: str | None = OPERATOR,
    ) -> None:
        """As `put_instance`, durable, with an event in the same commit: of an operator's action,
        or, with None, of the worker's."""
        now = self.instance(record.ref)
        is_new = now is None or now.status is not record.status
        put = self.change_put(record, reason=reason if is_new else None)  # of the status
        draft = EventDraft(
            kind, Lane.instance(record.ref), reason=reason, detail=detail, actor=actor
        )
        await self._put(record, self._with_event(put, draft), durable=True)

    async def release_instance(
        self, ref: InstanceRef, *, reason: str, detail: dict[str, Any]
    ) -> None:
        """Delete the record, durably, with a `released` event; its state key is deleted."""
        draft = EventDraft(EventKind.RELEASED, Lane.instance(ref), reason=reason, detail=detail)
        drop = self.change_drop(ref, self.tombstone(ref), to=RELEASED)
        await self._submit(self._with_event(drop, draft), durable=True)

    def _with_event(self, change: Change, draft: EventDraft) -> Change:
        at_ms = self._store.now_ms()

        def save(tx: Transaction) -> None:
            change.save(tx)
            self._store.source.event(tx, draft, at_ms)

        return Change(save, change.remember)

    async def _put(self, record: InstanceRecord, change: Change, *, durable: bool) -> None:
        try:
            await self._submit(change, durable=durable)
        except sqlite3.IntegrityError as error:
            if "uid_slot" in str(error):
                raise Conflict(
                    f"cannot record {record.ref}: uid slot {record.uid_slot} belongs to another "
                    "instance"
                ) from error
            raise Conflict(
                f"cannot record {record.ref}: address offset {record.offset} is used by another "
                f"instance of {record.ref.tenant_id}"
            ) from error

    def change_put(
        self,
        record: InstanceRecord,
        *,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        command_id: str | None = None,
    ) -> Change:
        """What `put_instance` commits, for a transaction that does more."""
        ref = record.ref
        draft = EventDraft(
            kind=EventKind.STATUS,
            lane=Lane.instance(ref),
            to=record.status.value,
            command_id=command_id or record.command_id,
            reason=reason,
            detail=detail,
        )
        due = record.metering.due if record.metering is not None else ()
        record = _published(record)
        packed = msgspec.json.encode(record)
        offset = record.offset if record.holds_offset else None
        at_ms = self._store.now_ms()
        state = {
            "since_ms": record.since_ms,
            "launch": record.launch,
            "revision": record.revision,
            "command_id": command_id or record.command_id,
            "reason": reason,
        }

        def save(tx: Transaction) -> None:
            key = (ref.tenant_id, ref.pool_id, ref.instance_id)
            if not tx.execute(SAME_PLACES, (packed, *key, record.uid_slot, offset)).rowcount:
                tx.execute(PUT_INSTANCE, (*key, record.uid_slot, offset, packed))
            self._store.source.announce(tx, draft, at_ms, state)
            self._publish_usage(tx, draft, due, at_ms)

        def remember() -> None:
            self._store.mirror.instances.put(record)

        return Change(save, remember)

    async def drop_instance(self, ref: InstanceRef, tombstone: Tombstone | None) -> None:
        """Delete the instance, durably: `destroyed` is published, its state key deleted."""
        await self._submit(self.change_drop(ref, tombstone), durable=True)

    def change_drop(
        self,
        ref: InstanceRef,
        tombstone: Tombstone | None,
        *,
        command_id: str | None = None,
        to: str = Status.DESTROYED.value,
        metering: Metering | None = None,
    ) -> Change:
        """What `drop_instance` commits, for a transaction that does more.

        The event has the instance's totals, which go with the record: those of `metering`.
        """
        record = self._store.mirror.instances.get(ref)
        if metering is None and record is not None:
            metering = record.metering
        draft = EventDraft(
            kind=EventKind.STATUS,
            lane=Lane.instance(ref),
            to=to,
            command_id=command_id or (record.command_id if record else None),
            detail=None if metering is None else {"totals": to_builtins(metering.totals)},
        )
        key = (ref.tenant_id, ref.pool_id, ref.instance_id)
        at_ms = self._store.now_ms()

        def save(tx: Transaction) -> None:
            where = "WHERE tenant_id = ? AND pool_id = ? AND instance_id = ?"
            gone = tx.execute(f"DELETE FROM instance {where}", key).rowcount  # noqa: S608
            if tombstone is None:
                tx.execute(f"DELETE FROM tombstone {where}", key)  # noqa: S608
            else:
                packed = msgspec.json.encode(tombstone)
                tx.execute("INSERT OR REPLACE INTO tombstone VALUES (?, ?, ?, ?)", (*key, packed))
            if gone:
                if metering is not None:
                    self._publish_usage(tx, draft, metering.due, at_ms)
                self._store.source.announce(tx, draft, at_ms, None)

        def remember() -> None:
            self._store.mirror.instances.drop(ref)
            self._store.mirror.tombstones.drop(ref)
            if tombstone is not None:
                self._store.mirror.tombstones.put(tombstone)

        return Change(save, remember)

    def _publish_usage(
        self, tx: Transaction, cause: EventDraft, due: Sequence[UsageDetail], at_ms: int
    ) -> None:
        """Each span that ended is one event, in the commit of the record that has ended it."""
        for detail in due:
            draft = EventDraft(
                EventKind.USAGE,
                cause.lane,
                command_id=cause.command_id,
                detail=to_builtins(detail),
            )
            self._store.source.event(tx, draft, at_ms)

    async def _submit(self, change: Change, *, durable: bool) -> None:
        def apply(_: None) -> None:
            change.remember()

        await self._store.writer.submit(change.save, apply=apply, durable=durable)

    def tombstone(self, ref: InstanceRef) -> Tombstone | None:
        return self._store.mirror.tombstones.get(ref)

    def tombstone_count(self) -> int:
        """Destroyed instances that are remembered, without those with kept volumes."""
        return self._store.mirror.tombstones.prunable_count

    def kept_volumes(self, tenant_id: str) -> Sequence[Tombstone]:
        return tuple(self._store.mirror.tombstones.kept(tenant_id))

    async def prune_tombstones(
        self,
        *,
        keep_ms: int = TOMBSTONE_KEEP_MS,
        most: int = TOMBSTONES_MAX,
        limit: int = 500,
    ) -> int:
        """Forget up to `limit` instances destroyed `keep_ms` ago or earlier; returns how many.

        Beyond `most` the oldest of the tenant that has most go earlier. One with kept volumes
        stays: without it they could not be wiped, and they count in the tenant's disk quota.
        """
        before_ms = self._store.now_ms() - keep_ms
        tenants: defaultdict[str, list[Tombstone]] = defaultdict(list)
        for tombstone in self._store.mirror.tombstones.all():
            if not tombstone.kept_volumes:
                tenants[tombstone.ref.tenant_id].append(tombstone)
        going = [each for mine in tenants.values() for each in mine if each.at_ms <= before_ms]
        excess = sum(map(len, tenants.values())) - most
        if not going and excess > 0:
            largest = tenants[max(tenants, key=lambda tenant: len(tenants[tenant]))]
            going = sorted(largest, key=lambda each: each.at_ms)[:excess]
        going = going[:limit]
        if not going:
            return 0

        def save(tx: Transaction) -> list[Tombstone]:
            return [each for each in going if _delete_tombstone(tx, each)]

        def forget(gone: list[Tombstone]) -> None:
            for each in gone:
                self._store.mirror.tombstones.drop(each.ref)

        gone = await self._store.writer.submit(save, apply=forget)
        return len(gone)

    # -- networks ------------------------------------------------------------------------------

    def network(self, tenant_id: str) -> NetworkRecord | None:
        return self._store.mirror.networks.get(tenant_id)

    def networks(self) -> Sequence[NetworkRecord]:
        return tuple(self._store.mirror.networks.all())

    def network_count(self) -> int:
        return len(self._store.mirror.networks)

    def address_count(self) -> int:
        return self._store.mirror.networks.address_count

    def network_with_id(self, tenant_net_id: int) -> NetworkRecord | None:
        return self._store.mirror.networks.with_id(tenant_net_id)

    def networks_overlapping(self, subnet: IPv4Network) -> Sequence[NetworkRecord]:
        return self._store.mirror.networks.overlapping(subnet)

    def expect_network(self, record: NetworkRecord) -> None:
        """Return this record from now on; the outcome of its command commits it.

        It stays in memory if a commit fails meanwhile: the outcome is committed again.
        """
        networks, tenant_id = self._store.mirror.networks, record.tenant_id
        self._before.setdefault(tenant_id, networks.get(tenant_id))
        self._expected[tenant_id] = record
        networks.put(record)

    def unexpect_network(self, tenant_id: str) -> None:
        """The journal refused that record: return what was there before."""
        if self._expected.pop(tenant_id, None) is None:
            return
        before = self._before.pop(tenant_id)
        if before is None:
            self._store.mirror.networks.drop(tenant_id)
        else:
            self._store.mirror.networks.put(before)

    async def put_network(self, record: NetworkRecord, *, durable: bool = False) -> None:
        """Save; a changed status is published as a `network` event and in the state row.

        Within a command it needs no sync: the sync of the outcome covers it, and a command
        without an outcome is run again after a power loss.

        Raises:
            Conflict: another tenant has the `tenant_net_id`.
        """
        try:
            await self._submit(self.change_network(record), durable=durable)
        except sqlite3.IntegrityError as error:
            raise Conflict(
                f"cannot record the network of {record.tenant_id}: tenant_net_id "
                f"{record.net.tenant_net_id} belongs to another tenant"
            ) from error

    def change_network(self, record: NetworkRecord) -> Change:
        """What `put_network` commits, for a transaction that does more."""
        draft = EventDraft(EventKind.NETWORK, Lane.network(record.tenant_id), to=record.status)
        packed = msgspec.json.encode(record)
        at_ms = self._store.now_ms()
        state = {
            "since_ms": record.since_ms,
            "bridge_name": record.net.bridge_name,
            "ipv4_subnet": record.net.ipv4_subnet,
        }

        def save(tx: Transaction) -> None:
            tx.execute(
                "INSERT INTO network VALUES (?, ?, ?) ON CONFLICT (tenant_id) DO UPDATE SET "
                "tenant_net_id = excluded.tenant_net_id, record = excluded.record",
                (record.tenant_id, record.net.tenant_net_id, packed),
            )
            self._store.source.announce(tx, draft, at_ms, state)

        def delete(tx: Transaction) -> None:
            gone = tx.execute("DELETE FROM network WHERE tenant_id = ?", (record.tenant_id,))
            if gone.rowcount:
                self._store.source.announce(tx, draft, at_ms, None)

        def remember() -> None:
            self._is_committed(record.tenant_id)
            self._store.mirror.networks.put(record)

        def forget() -> None:
            self._is_committed(record.tenant_id)
            self._store.mirror.networks.drop(record.tenant_id)

        return Change(delete, forget) if record.status == ABSENT else Change(save, remember)

    def _is_committed(self, tenant_id: str) -> None:
        self._expected.pop(tenant_id, None)
        self._before.pop(tenant_id, None)

    def _reloaded(self, mirror: Mirror) -> None:
        for record in self._expected.values():
            mirror.networks.put(record)

    # -- events --------------------------------------------------------------------------------

    async def event(
        self,
        kind: EventKind,
        *,
        ref: InstanceRef | None = None,
        tenant_id: str | None = None,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        command_id: str | None = None,
    ) -> None:
        """Publish what changes no status; without `ref` and `tenant_id` it is about the host."""
        if ref is not None:
            lane = Lane.instance(ref)
        elif tenant_id is not None:
            lane = Lane.network(tenant_id)
        else:
            lane = Lane.host()
        draft = EventDraft(kind, lane, command_id=command_id, reason=reason, detail=detail)
        at_ms = self._store.now_ms()
        await self._store.writer.submit(lambda tx: self._store.source.event(tx, draft, at_ms))


def _published(record: InstanceRecord) -> InstanceRecord:
    """As it is stored: what is due goes out with it, and is not found again."""
    if record.metering is None or not record.metering.due:
        return record
    return replace(record, metering=replace(record.metering, due=()))


def _delete_tombstone(tx: Transaction, tombstone: Tombstone) -> bool:
    """Delete it unless a Destroy that was queued before has replaced it."""
    ref = tombstone.ref
    key = (ref.tenant_id, ref.pool_id, ref.instance_id)
    where = "WHERE tenant_id = ? AND pool_id = ? AND instance_id = ?"
    row = tx.execute(f"SELECT record FROM tombstone {where}", key).fetchone()  # noqa: S608
    if row is None or msgspec.json.decode(row[0], type=Tombstone) != tombstone:
        return False
    tx.execute(f"DELETE FROM tombstone {where}", key)  # noqa: S608
    return True
