"""Instances, networks and tombstones (`handlers.interfaces.Records`), and the events they cause."""

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from handlers.errors import Conflict
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, NetworkRecord, Status, Tombstone
from schemas.requests import InstanceRef
from schemas.subjects import Lane
from worker.journal.events import EventDraft
from worker.journal.store import JournalFile
from worker.journal.transaction import Transaction

ABSENT = "absent"


class JournalRecords(JournalFile):
    """Reads from memory; a put is committed when it returns."""

    # -- instances -----------------------------------------------------------------------------

    def instance(self, ref: InstanceRef) -> InstanceRecord | None:
        return self._mirror.instances.get(ref)

    def instances(self, tenant_id: str | None = None) -> Sequence[InstanceRecord]:
        """All, or one tenant's."""
        records = self._mirror.instances.values()
        return tuple(r for r in records if tenant_id is None or r.ref.tenant_id == tenant_id)

    async def put_instance(
        self,
        record: InstanceRecord,
        *,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        durable: bool = False,
    ) -> None:
        """Save; a changed status is announced (event and state) in the same transaction.

        Raises:
            Conflict: another instance has the uid slot, or lives or sleeps with the offset.
        """
        do, apply = self._putting(record, reason=reason, detail=detail)
        try:
            await self._writer.submit(do, apply=apply, durable=durable)
        except sqlite3.IntegrityError as error:
            if "uid_slot" in str(error):
                raise Conflict(f"uid slot {record.uid_slot} belongs to another instance") from error
            raise Conflict(
                f"address offset {record.offset} is used by another instance of "
                f"{record.ref.tenant_id}"
            ) from error

    def _putting(
        self,
        record: InstanceRecord,
        *,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        command_id: str | None = None,
    ) -> tuple[Callable[[Transaction], None], Callable[[object], None]]:
        """What saves a record within a transaction, and what then follows in memory."""
        ref = record.ref
        draft = EventDraft(
            kind=EventKind.STATUS,
            lane=Lane.instance(ref),
            to=record.status.value,
            command_id=command_id or record.command_id,
            reason=reason,
            detail=detail,
        )
        packed = msgspec.json.encode(record)
        offset = record.offset if record.holds_offset else None
        at_ms = self._now_ms()
        state = {
            "since_ms": record.since_ms,
            "launch": record.launch,
            "revision": record.revision,
            "command_id": command_id or record.command_id,
            "reason": reason,
        }

        def do(tx: Transaction) -> None:
            key = (ref.tenant_id, ref.pool_id, ref.instance_id)
            tx.execute(
                "INSERT INTO instance VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (tenant_id, pool_id, instance_id) DO UPDATE SET "
                "uid_slot = excluded.uid_slot, address_offset = excluded.address_offset, "
                "record = excluded.record",
                (*key, record.uid_slot, offset, packed),
            )
            self.source.announce(tx, draft, at_ms, state)

        def apply(_: object) -> None:
            self._mirror.instances[ref] = record

        return do, apply

    async def drop_instance(self, ref: InstanceRef, tombstone: Tombstone | None) -> None:
        """Forget the instance, durably: `destroyed` is announced, its state key goes."""
        do, apply = self._dropping(ref, tombstone)
        await self._writer.submit(do, apply=apply, durable=True)

    def _dropping(
        self, ref: InstanceRef, tombstone: Tombstone | None, *, command_id: str | None = None
    ) -> tuple[Callable[[Transaction], None], Callable[[object], None]]:
        record = self._mirror.instances.get(ref)
        draft = EventDraft(
            kind=EventKind.STATUS,
            lane=Lane.instance(ref),
            to=Status.DESTROYED.value,
            command_id=command_id or (record.command_id if record else None),
        )
        key = (ref.tenant_id, ref.pool_id, ref.instance_id)
        at_ms = self._now_ms()

        def do(tx: Transaction) -> None:
            where = "WHERE tenant_id = ? AND pool_id = ? AND instance_id = ?"
            gone = tx.execute(f"DELETE FROM instance {where}", key).rowcount  # noqa: S608
            if tombstone is None:
                tx.execute(f"DELETE FROM tombstone {where}", key)  # noqa: S608
            else:
                packed = msgspec.json.encode(tombstone)
                tx.execute("INSERT OR REPLACE INTO tombstone VALUES (?, ?, ?, ?)", (*key, packed))
            if gone:
                self.source.announce(tx, draft, at_ms, None)

        def apply(_: object) -> None:
            self._mirror.instances.pop(ref, None)
            self._mirror.tombstones.pop(ref, None)
            if tombstone is not None:
                self._mirror.tombstones[ref] = tombstone

        return do, apply

    def tombstone(self, ref: InstanceRef) -> Tombstone | None:
        return self._mirror.tombstones.get(ref)

    # -- networks ------------------------------------------------------------------------------

    def network(self, tenant_id: str) -> NetworkRecord | None:
        return self._mirror.networks.get(tenant_id)

    def networks(self) -> Sequence[NetworkRecord]:
        return tuple(self._mirror.networks.values())

    async def put_network(self, record: NetworkRecord, *, durable: bool = False) -> None:
        """Save; a changed status is announced by a `network` event and the state row.

        Within a command it needs no sync of its own: its outcome's comes after it, and without
        one the command goes on after a power loss.

        Raises:
            Conflict: another tenant has the `tenant_net_id`.
        """
        draft = EventDraft(EventKind.NETWORK, Lane.network(record.tenant_id), to=record.status)
        packed = msgspec.json.encode(record)
        at_ms = self._now_ms()
        state = {
            "since_ms": record.since_ms,
            "bridge_name": record.net.bridge_name,
            "ipv4_subnet": record.net.ipv4_subnet,
        }

        def do(tx: Transaction) -> None:
            tx.execute(
                "INSERT INTO network VALUES (?, ?, ?) ON CONFLICT (tenant_id) DO UPDATE SET "
                "tenant_net_id = excluded.tenant_net_id, record = excluded.record",
                (record.tenant_id, record.net.tenant_net_id, packed),
            )
            self.source.announce(tx, draft, at_ms, state)

        def apply(_: None) -> None:
            self._mirror.networks[record.tenant_id] = record

        try:
            await self._writer.submit(do, apply=apply, durable=durable)
        except sqlite3.IntegrityError as error:
            raise Conflict(
                f"tenant_net_id {record.net.tenant_net_id} belongs to another tenant"
            ) from error

    async def drop_network(self, tenant_id: str) -> None:
        """Forget the network: `absent` is announced, its state key goes. As `put_network`."""
        draft = EventDraft(EventKind.NETWORK, Lane.network(tenant_id), to=ABSENT)
        at_ms = self._now_ms()

        def do(tx: Transaction) -> None:
            if tx.execute("DELETE FROM network WHERE tenant_id = ?", (tenant_id,)).rowcount:
                self.source.announce(tx, draft, at_ms, None)

        def apply(_: None) -> None:
            self._mirror.networks.pop(tenant_id, None)

        await self._writer.submit(do, apply=apply)

    # -- events --------------------------------------------------------------------------------

    async def event(
        self,
        kind: str,
        *,
        ref: InstanceRef | None = None,
        tenant_id: str | None = None,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        command_id: str | None = None,
    ) -> None:
        """Tell of something that is no change of a status; without ref and tenant, of the host."""
        if ref is not None:
            lane = Lane.instance(ref)
        elif tenant_id is not None:
            lane = Lane.network(tenant_id)
        else:
            lane = Lane.host()
        draft = EventDraft(
            EventKind(kind), lane, command_id=command_id, reason=reason, detail=detail
        )
        at_ms = self._now_ms()
        await self._writer.submit(lambda tx: self.source.event(tx, draft, at_ms))
