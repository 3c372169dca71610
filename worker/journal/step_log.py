"""The step log (`handlers.mechanism.StepLog`): what a command is about to create, or created."""

from collections.abc import Mapping, Sequence
from typing import Final

from handlers.mechanism import Durability, StepIntent, StepRow
from worker.journal.store import Store
from worker.journal.transaction import Transaction

INSERT: Final = (
    "INSERT OR IGNORE INTO step (command_id, mechanism, key, existed) VALUES (?, ?, ?, ?)"
)


class JournalSteps:
    """Rows of unfinished commands; of finished ones, what they left behind."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def begin(self, command_id: str, *intents: StepIntent) -> Sequence[StepRow]:
        """Commit the intents in one transaction; the row of an earlier run is kept and returned."""
        before = self._store.mirror.steps.get(command_id, {})
        found = [row for i in intents if (row := before.get((i.mechanism, i.key))) is not None]
        if len(found) == len(intents):  # as for each step that was announced
            return tuple(found)
        new = {(i.mechanism, i.key): i for i in intents if (i.mechanism, i.key) not in before}
        rows = {name: StepRow(*name, intent.existed) for name, intent in new.items()}
        result = tuple((before | rows)[i.mechanism, i.key] for i in intents)

        def do(tx: Transaction) -> None:
            for row in rows.values():
                tx.execute(INSERT, (command_id, row.mechanism, row.key, row.existed))

        def apply(_: object) -> None:
            mirrored = self._store.mirror.steps.setdefault(command_id, {})
            for name, row in rows.items():
                mirrored.setdefault(name, row)

        if all(intent.durability is Durability.IMPLIED for intent in new.values()):
            apply(None)
            self._store.writer.later(do)
            return result
        durable = any(
            not intent.existed and intent.durability is not Durability.VOLATILE
            for intent in new.values()
        )
        await self._store.writer.submit(do, apply=apply, durable=durable)
        return result

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

    def all_rows(self) -> list[StepRow]:
        """Of unfinished commands, and what finished ones left behind."""
        return [row for rows in self._store.mirror.steps.values() for row in rows.values()]

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
