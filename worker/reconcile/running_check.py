"""The periodic check of instances that run: a slice of them in each pass, repairs in their lanes.

What is restored, and what cannot be while the VMM runs, is announced by a `drift` event; the latter
once, until it changes.
"""

from functools import partial

import structlog

from handlers.instance.running_check import is_running, restore_running, survey_running
from handlers.interfaces import Host
from schemas.records import InstanceRecord
from schemas.requests import InstanceRef
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.lanes import Lanes, MaintenanceTask
from worker.logs import facts_of
from worker.metrics import Metrics
from worker.reconcile.drift import report_drift

SLICE = 64
PASSES = 4  # in which all are compared, if there are more than one slice of them

log = structlog.get_logger()


class RunningCheck:
    """One slice a pass: all of `SLICE` instances, of more a quarter."""

    def __init__(self, host: Host, journal: Journal, lanes: Lanes, metrics: Metrics) -> None:
        self._host = host
        self._journal = journal
        self._metrics = metrics
        self._lanes = lanes
        self._left: list[InstanceRef] = []
        self._size = SLICE
        self._lost: dict[InstanceRef, tuple[str, ...]] = {}

    @property
    def lost(self) -> int:
        """How many parts the running instances lack for good, as of their last check."""
        return sum(map(len, self._lost.values()))

    async def run(self) -> None:
        """Compare the next slice; each that differs is restored in its lane."""
        slice_ = self._next()
        differing = await survey_running(slice_, self._host)
        for ref in {record.ref for record in slice_} - {record.ref for record in differing}:
            self._lost.pop(ref, None)
        for record in differing:
            task = MaintenanceTask("restore", partial(self._restore, record))
            self._lanes.put_maintenance(Lane.instance(record.ref), task)

    def _next(self) -> list[InstanceRecord]:
        records = self._journal.records
        if not self._left:
            self._left = [record.ref for record in records.instances() if is_running(record)]
            self._size = max(SLICE, -(-len(self._left) // PASSES))
            running = set(self._left)
            self._lost = {ref: lost for ref, lost in self._lost.items() if ref in running}
        now, self._left = self._left[: self._size], self._left[self._size :]
        return [record for ref in now if (record := records.instance(ref)) is not None]

    async def _restore(self, record: InstanceRecord) -> None:
        ref = record.ref
        try:
            restored = await restore_running(ref, record.launch, self._host)
        except Exception as error:  # noqa: BLE001 - logged; the rest goes on
            log.warning("instance.repair_failed", instance=str(ref), **facts_of(error))
            return
        known = self._lost.get(ref, ())  # what is of a launch has its number in its name
        is_news = bool(restored.lost) and known != restored.lost
        if restored.repaired or is_news:
            await report_drift(
                self._journal,
                self._metrics,
                restored,
                "changed out of band",
                ref=ref,
                known=known,
            )
        if restored.lost:
            self._lost[ref] = restored.lost
        else:
            self._lost.pop(ref, None)
