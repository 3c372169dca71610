"""The only owner of SQLite. What is in the journal will be answered, once, also after kill -9.

`Journal` puts six parts over one store: `commands` takes them in and ends them, `steps` is the
step log, `records` has instances and networks, `outbox` what waits to be sent, `quarantine` what
this version cannot read, `audit` what the worker removed by itself. `store` is the file and its one
writer thread (`writer.py` says how commits work).
"""

import time
from collections.abc import Callable
from typing import Self

from handlers.clock import now_ms
from schemas.subjects import Subjects
from worker.journal.admission import Limits
from worker.journal.audit import JournalAudit
from worker.journal.commands import JournalCommands
from worker.journal.outbox import JournalOutbox
from worker.journal.quarantine import JournalQuarantine
from worker.journal.records import JournalRecords
from worker.journal.step_log import JournalSteps
from worker.journal.store import Store
from worker.journal.writer import Relieve, keep_space


class Journal:
    """One file, one process. Every async method of a part returns when its change is committed.

    Raises:
        JournalFault: from every async method of a part; the change was not committed.
    """

    def __init__(
        self, store: Store, limits: Limits, *, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.store = store
        self.steps = JournalSteps(store)
        self.records = JournalRecords(store)
        self.outbox = JournalOutbox(store)
        self.quarantine = JournalQuarantine(store)
        self.audit = JournalAudit(store)
        self.commands = JournalCommands(store, self.records, limits, monotonic_s=monotonic_s)

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        subjects: Subjects,
        boot_id: str,
        lane_depth: int = 100,
        tenant_depth: int = 1000,
        host_depth: int = 5000,
        observe_commit: Callable[[float], None] = lambda seconds: None,
        relieve: Relieve = keep_space,
        clock_ms: Callable[[], int] = now_ms,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Open the file, or make it. Raises as `Store.open` does."""
        store = await Store.open(
            path,
            subjects=subjects,
            boot_id=boot_id,
            observe_commit=observe_commit,
            relieve=relieve,
            clock_ms=clock_ms,
        )
        return cls(store, Limits(lane_depth, tenant_depth, host_depth), monotonic_s=monotonic_s)

    async def close(self) -> None:
        """Commit what was submitted and close the file."""
        await self.store.close()
