"""Says what was changed out of band and what became of it: a `drift` event, a counter by kind."""

from collections.abc import Collection
from typing import Literal

from handlers.specs import Restored
from schemas.envelopes import EventKind
from schemas.requests import InstanceRef
from worker.journal.journal import Journal
from worker.metrics import Metrics

BASE_RULES = Restored(repaired=("base_rules",))


async def report_drift(
    journal: Journal,
    metrics: Metrics,
    restored: Restored,
    reason: Literal["changed out of band", "found at start"],
    *,
    ref: InstanceRef | None = None,
    tenant_id: str | None = None,
    known: Collection[str] = (),
) -> None:
    """Of an instance, of a tenant's network, or without both of the host.

    What is counted is the first word of each name, which is the mechanism's or the file's; of what
    is lost, nothing again that was `known` to be.
    """
    lost = [name for name in restored.lost if name not in known]
    for result, names in (("repaired", restored.repaired), ("lost", lost)):
        for name in names:
            metrics.vmms.drift(name.split(" ")[0], result)
    await journal.records.event(
        EventKind.DRIFT,
        ref=ref,
        tenant_id=tenant_id,
        reason=reason,
        detail={"repaired": list(restored.repaired), "lost": list(restored.lost)},
    )
