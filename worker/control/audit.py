"""The route of `hostd audit`: what was done on this host without a command."""

from msgspec import to_builtins

from worker.control.routes import Answer, Body, read_nothing
from worker.journal.audit import JournalAudit


class AuditRoute:
    """Reads the journal beside its writer, so also while it cannot commit."""

    def __init__(self, audit: JournalAudit) -> None:
        self._audit = audit

    async def answer(self, body: Body) -> Answer:
        read_nothing(body)
        return {"actions": [to_builtins(row) for row in await self._audit.newest()]}
