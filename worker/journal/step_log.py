"""The step log (`handlers.mechanism.StepLog`): what a command is about to create, or created."""

from collections.abc import Mapping, Sequence
from typing import Final

from handlers.mechanism import StepRow
from worker.journal.store import Store
from worker.journal.transaction import Transaction

# What these make is gone after a reboot, and so may their rows be. All others are synced.
VOLATILE: Final = frozenset(
    {"bridge", "tenant_rules", "pin", "tap", "cgroups", "vmms", "pause", "phase"}
)
# What these make is made by a later commit of the journal itself (the record), or under a later
# row (the jail's links). Commits keep the order of submission: that one takes theirs to disk.
IMPLIED_DURABLE: Final = frozenset({"reservation", "snapshot_use"})
INSERT: Final = (
    "INSERT OR IGNORE INTO step (command_id, mechanism, key, existed) VALUES (?, ?, ?, ?)"
)


class JournalSteps:
    """Rows of unfinished commands; of finished ones, what they left behind."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def begin(self, command_id: str, mechanism: str, key: str, *, existed: bool) -> StepRow:
        """Commit the intent; an earlier run's row is returned unchanged."""
        known = self._store.mirror.steps.get(command_id, {}).get((mechanism, key))
        if known is not None:
            return known
        row = StepRow(mechanism, key, existed)
        await self.begin_all(command_id, (row,))
        return row

    async def begin_all(self, command_id: str, rows: Sequence[StepRow]) -> None:
        """Commit several intents at once; rows that exist stay as they are."""
        known = self._store.mirror.steps.get(command_id, {})
        new = {(r.mechanism, r.key): r for r in rows if (r.mechanism, r.key) not in known}
        values = [(command_id, row.mechanism, row.key, row.existed) for row in new.values()]

        def do(tx: Transaction) -> None:
            for each in values:
                tx.execute(INSERT, each)

        def apply(_: object) -> None:
            rows_of_command = self._store.mirror.steps.setdefault(command_id, {})
            for name, row in new.items():
                rows_of_command.setdefault(name, row)

        if not new:
            return
        if all(row.mechanism in IMPLIED_DURABLE for row in new.values()):
            apply(None)
            self._store.writer.later(do)
            return
        synced = any(not r.existed and r.mechanism not in VOLATILE for r in new.values())
        await self._store.writer.submit(do, apply=apply, durable=synced)

    async def forget(self, command_id: str, mechanism: str, key: str) -> None:
        """Delete a row: the resource is gone, or was not this command's."""

        def do(tx: Transaction) -> None:
            tx.execute(
                "DELETE FROM step WHERE command_id = ? AND mechanism = ? AND key = ?",
                (command_id, mechanism, key),
            )

        def apply(_: None) -> None:
            rows = self._store.mirror.steps.get(command_id, {})
            rows.pop((mechanism, key), None)
            if not rows:
                self._store.mirror.steps.pop(command_id, None)

        await self._store.writer.submit(do, apply=apply)

    def rows(self, command_id: str) -> Sequence[StepRow]:
        """In the order of `begin`."""
        return tuple(self._store.mirror.steps.get(command_id, {}).values())

    def leftovers(self) -> Mapping[str, Sequence[StepRow]]:
        """What finished commands could not undo, by command ID: for the sweep to remove."""
        return {
            command_id: tuple(rows.values())
            for command_id, rows in self._store.mirror.steps.items()
            if command_id not in self._store.mirror.commands
        }

    async def mark(self, command_id: str, name: str) -> None:
        """Commit a mark, durably, before the effect that it is about."""

        def do(tx: Transaction) -> None:
            tx.execute("INSERT OR IGNORE INTO point VALUES (?, ?)", (command_id, name))

        def apply(_: None) -> None:
            self._store.mirror.points.setdefault(command_id, set()).add(name)

        await self._store.writer.submit(do, apply=apply, durable=True)

    def marked(self, command_id: str, name: str) -> bool:
        return name in self._store.mirror.points.get(command_id, ())
