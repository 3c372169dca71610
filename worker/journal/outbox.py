"""What waits to be sent: outbox rows in order, and the newest state per key."""

from collections.abc import Sequence

from worker.journal import memory
from worker.journal.store import JournalFile
from worker.journal.transaction import OutRow, StateRow, Transaction


class JournalOutbox(JournalFile):
    """Rows stay until the bus has them for sure; after kill -9 they are sent again."""

    @property
    def depth(self) -> int:
        """Unsent messages of all kinds, and state keys."""
        return self._mirror.unsent + len(self._mirror.states)

    def count(self, kind: str) -> int:
        """Unsent rows of a kind."""
        return self._mirror.out[kind].count

    async def wait_sent(self) -> None:
        """Return after the next `sent`."""
        arrival = self._arrival("sent")
        arrival.clear()
        await arrival.wait()

    async def pending(self, kind: str, limit: int) -> Sequence[OutRow]:
        """The first unsent rows of a kind, in order; empty if there are none."""
        queue = self._mirror.out[kind]
        if not queue.rows and queue.spilled:
            after = queue.last
            await self._writer.read(
                lambda tx: memory.read_out(tx.connection, kind, after=after),
                apply=queue.refill,
            )
        rows: list[OutRow] = []
        for row in queue.rows.values():
            rows.append(row)
            if len(rows) == limit:
                break
        return rows

    async def wait_pending(self, kind: str) -> None:
        """Return once there is something of this kind to send."""
        arrival = self._arrival(kind)
        while not self._mirror.out[kind].count:
            arrival.clear()
            await arrival.wait()

    def sent(self, rows: Sequence[OutRow]) -> None:
        """Forget rows that the bus confirmed; on disk within some 20 ms."""
        for row in rows:
            queue = self._mirror.out[row.kind]
            if queue.rows.pop(row.n, None) is not None:
                queue.count -= 1
                self._gone.add(row.n)
        self._arrival("sent").set()
        if not self._forgetting:
            self._forgetting = True
            self._writer.later(self._forget_gone, apply=self._forgot)
        if not self._taking and self.writable and not self.backlogged:
            self._tell()

    def _forget_gone(self, tx: Transaction) -> tuple[int, ...]:
        """In the writer's thread: all that are gone by now."""
        gone = tuple(self._gone)
        tx.connection.executemany("DELETE FROM outbox WHERE n = ?", ((n,) for n in gone))
        return gone

    def _forgot(self, gone: tuple[int, ...]) -> None:
        self._gone.difference_update(gone)
        self._forgetting = False
        if self._gone:
            self.sent(())

    # -- state ---------------------------------------------------------------------------------

    def dirty(self) -> Sequence[StateRow]:
        """The newest value of each key that the bucket does not have yet."""
        return tuple(self._mirror.states.values())

    async def wait_dirty(self) -> None:
        """Return once there is a key to write."""
        arrival = self._arrival("state")
        while not self._mirror.states:
            arrival.clear()
            await arrival.wait()

    def written(self, key: str, seq: int) -> None:
        """The bucket has the value of `seq`; a newer one stays to be written."""
        row = self._mirror.states.get(key)
        if row is None or row.seq != seq:
            return
        del self._mirror.states[key]

        def do(tx: Transaction) -> None:
            tx.execute("DELETE FROM state WHERE key = ? AND seq = ? AND value IS NULL", (key, seq))
            tx.execute("UPDATE state SET dirty = 0 WHERE key = ? AND seq = ?", (key, seq))

        self._writer.later(do)

    async def rewrite_state(self) -> None:
        """Have every key written again, e.g. into a bucket that was made anew."""

        def do(tx: Transaction) -> list[StateRow]:
            tx.execute("UPDATE state SET dirty = 1")
            rows = tx.execute("SELECT key, value, seq FROM state")
            tx.states.extend(StateRow(*row) for row in rows)
            return tx.states

        await self._writer.submit(do)
