"""What waits to be sent: outbox rows in order, and the newest state per key."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

from worker.journal import loading, memory
from worker.journal.memory import Mirror
from worker.journal.store import Store
from worker.journal.transaction import OutRow, StateRow, Transaction

BACKLOG_ROWS: Final = 100_000
# What the bus has is noted with the next commit, or after this time. Until then a kill has it sent
# again: to the bucket; to a stream, which knows the ID for `streams.DEDUPE_NS` and after that has
# the message twice; or to an inbox, where copies may repeat.
SENT_S: Final = 0.25
CLEAN: Final = "UPDATE state SET dirty = 0 WHERE key = ? AND seq = ?"
DELETE: Final = "DELETE FROM state WHERE key = ? AND seq = ?"


class JournalOutbox:
    """A row stays until the bus confirmed it; after kill -9 it is sent again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._arrivals = {kind: asyncio.Event() for kind in (*memory.OUT_KINDS, "state", "sent")}
        self._gone: set[int] = set()  # sent, but perhaps still in the file
        self._forgetting = False
        self._send_now: Callable[[Sequence[OutRow]], int] | None = None
        self._backlogged = False
        self._backlogged = self._over_limit(store.mirror)
        store.on_commit(self._committed)
        store.on_reload(self._reloaded)

    @property
    def depth(self) -> int:
        """Unsent messages of all kinds, and state keys."""
        return self._store.mirror.unsent + len(self._store.mirror.states)

    @property
    def backlogged(self) -> bool:
        """Whether too much is unsent: true at `BACKLOG_ROWS`, until a tenth of that is sent."""
        return self._backlogged

    def count(self, kind: str) -> int:
        """Unsent rows of a kind."""
        return self._store.mirror.out[kind].count

    @property
    def held(self) -> int:
        """Rows of all kinds that the bus does not accept as they are."""
        return sum(len(queue.held) for queue in self._store.mirror.out.values())

    def sendable(self, kind: str) -> int:
        """Unsent rows of a kind that are not held."""
        queue = self._store.mirror.out[kind]
        return queue.count - len(queue.held)

    def send_at_once(self, send: Callable[[Sequence[OutRow]], int] | None) -> None:
        """Call `send` with direct replies in the callback of their commit, unless others wait.

        It returns how many of them it sent, and must not raise.
        """
        self._send_now = send

    async def wait_sent(self) -> None:
        """Return after the next `sent`."""
        arrival = self._arrivals["sent"]
        arrival.clear()
        await arrival.wait()

    async def pending(self, kind: str, limit: int) -> Sequence[OutRow]:
        """The first unsent rows of a kind, in order; empty if there are none."""
        queue = self._store.mirror.out[kind]
        if not queue.rows and queue.spilled:
            after = queue.last
            await self._store.writer.read(
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
        """Return once there is a row of this kind to send."""
        arrival = self._arrivals[kind]
        while not self.sendable(kind):
            arrival.clear()
            await arrival.wait()

    def hold(self, row: OutRow) -> None:
        """Keep a row back, so that the next ones are sent, until `release`."""
        queue = self._store.mirror.out[row.kind]
        if queue.rows.pop(row.n, None) is not None:
            queue.held[row.n] = row
        self._arrivals["sent"].set()

    def release(self) -> None:
        """Try the held rows again, each in its place; the bus may accept them now."""
        for kind, queue in self._store.mirror.out.items():
            if queue.held:
                queue.rows = dict(sorted((queue.rows | queue.held).items()))
                queue.held = {}
                self._arrivals[kind].set()

    def sent(self, rows: Sequence[OutRow]) -> None:
        """Delete rows that the bus confirmed; on disk within `SENT_S`."""
        if not rows and not self._gone:
            return
        for row in rows:
            queue = self._store.mirror.out[row.kind]
            known = queue.rows.pop(row.n, None) or queue.held.pop(row.n, None)
            if known is not None:
                queue.count -= 1
                self._gone.add(row.n)
        self._arrivals["sent"].set()
        if not self._forgetting:
            self._forgetting = True
            self._store.writer.later(self._forget_gone, apply=self._forgot, within_s=SENT_S)
        if self._backlogged:
            self._check_backlog()

    def _forget_gone(self, tx: Transaction) -> tuple[int, ...]:
        """In the writer's thread: delete all that were sent by now."""
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
        return tuple(self._store.mirror.states.values())

    async def wait_dirty(self) -> None:
        """Return once there is a key to write."""
        arrival = self._arrivals["state"]
        while not self._store.mirror.states:
            arrival.clear()
            await arrival.wait()

    def written(self, key: str, seq: int) -> None:
        """The bucket has the value of `seq`; a newer one remains to be written."""
        row = self._store.mirror.states.get(key)
        if row is None or row.seq != seq:
            return
        del self._store.mirror.states[key]
        done = CLEAN if row.value is not None else DELETE

        def do(tx: Transaction) -> None:
            tx.execute(done, (key, seq))

        self._store.writer.later(do, within_s=SENT_S)

    async def rewrite_state(self) -> None:
        """Mark every key dirty, e.g. for a bucket that was deleted and created again."""

        def do(tx: Transaction) -> list[StateRow]:
            tx.execute("UPDATE state SET dirty = 1")
            for row in tx.execute("SELECT key, value, seq FROM state").fetchall():
                with contextlib.suppress(loading.Unreadable, UnicodeEncodeError):  # quarantined
                    tx.states.append(loading.state_row(*row))
            return tx.states

        await self._store.writer.submit(do)

    # -- after a commit or a fault -------------------------------------------------------------

    def _committed(self, transaction: Transaction) -> None:
        mirror = self._store.mirror
        first = not self.sendable("direct")
        for row in transaction.out:
            mirror.out[row.kind].add(row)
        direct = tuple(mirror.out["direct"].rows.values()) if first else ()
        if direct and self._send_now is not None:
            # Somebody waits for them: they are sent before anything else happens.
            self.sent(direct[: self._send_now(direct)])
        for kind in {row.kind for row in transaction.out}:
            if self.sendable(kind):
                self._arrivals[kind].set()
        for state in transaction.states:
            mirror.states[state.key] = state
            self._arrivals["state"].set()
        if transaction.out and not self._backlogged:
            self._check_backlog()

    def _reloaded(self, mirror: Mirror) -> None:
        for queue in mirror.out.values():
            for n in self._gone & queue.rows.keys():
                del queue.rows[n]
                queue.count -= 1
        self._forgetting = False  # the deletion failed with the rest of its commit
        self._backlogged = self._over_limit(mirror)
        for kind in (*memory.OUT_KINDS, "state"):
            self._arrivals[kind].set()

    def _check_backlog(self) -> None:
        before, self._backlogged = self._backlogged, self._over_limit(self._store.mirror)
        if self._backlogged != before:
            self._store.notify()

    def _over_limit(self, mirror: Mirror) -> bool:
        return mirror.unsent >= (BACKLOG_ROWS * 9 // 10 if self._backlogged else BACKLOG_ROWS)
