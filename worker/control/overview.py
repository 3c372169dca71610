"""What `hostd top` shows, for `GET /v1/top`: counts, and the commands that run longest."""

import time
from collections.abc import Mapping, Sequence
from typing import Final

from handlers.concurrency import Slots
from worker.control.routes import Answer, Body, read_nothing
from worker.control.view import WorkerView
from worker.lanes import Work

RUNNING_SHOWN: Final = 20


class Overview:
    """Answers the route; cheap enough for one request a second on a crowded host."""

    def __init__(self, worker: WorkerView) -> None:
        self._worker = worker

    async def answer(self, body: Body) -> Answer:
        read_nothing(body)
        journal = self._worker.journal
        facts = self._worker.facts()
        slots = {name: getattr(self._worker.slots, name) for name in Slots.__dataclass_fields__}
        return {
            "host_id": journal.store.subjects.host_id,
            "host_state": facts["host_state"],
            "failed_checks": [name for name, ok in self._worker.checks().items() if not ok],
            "capacity": facts["capacity"],
            "instances": {
                status.value: count for status, count in journal.records.statuses().items() if count
            },
            "networks": len(journal.records.networks()),
            "lanes": self._worker.lanes.counts(),
            "unfinished": journal.commands.count(),
            "finished": self._worker.metrics.finished(),
            "unsent": journal.outbox.depth,
            "connected": self._worker.bus.connected,
            "slots": {
                name: {
                    "count": kind.count,
                    "held": sum(kind.holders().values()),
                    "waiting": kind.waiting,
                }
                for name, kind in slots.items()
            },
            "running": self._running(),
        }

    def _running(self) -> Sequence[Mapping[str, object]]:
        """The commands whose current step began first."""
        now_s = time.perf_counter()
        found = [
            (min((began_s for _, began_s in work.steps.doing), default=now_s), work)
            for work, _ in self._worker.lanes.work().values()
            if isinstance(work, Work) and work.steps is not None
        ]
        found.sort(key=lambda each: each[0])
        return [
            {
                "id": work.row.id,
                "type": work.row.command.request.kind,
                "lane": str(work.row.lane),
                "steps": [step for step, _ in work.steps.doing] if work.steps else [],
                "since_s": round(now_s - began_s, 3),
            }
            for began_s, work in found[:RUNNING_SHOWN]
        ]
