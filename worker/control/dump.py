"""The full state of a worker as plain values, for `GET /v1/dump`. Reads memory, changes nothing.

Each section is independent: one that fails holds its error and leaves the others. Lists that
tenants can make long are cut at `SHOWN`, with the number left out beside them.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
import structlog

from handlers.concurrency import FairSlots, Slots
from handlers.thread_stack import FRAMES, frames_of
from schemas.subjects import Lane
from worker.control.routes import Answer, Body, encode, read_nothing
from worker.control.view import WorkerView
from worker.journal.memory import OUT_KINDS, CommandRow
from worker.lanes import MaintenanceTask, Work
from worker.queries.answers import described

FILE: Final = "dump.json"  # in [paths] run, by SIGUSR1
SHOWN: Final = 1000
T = TypeVar("T")
Item = Work | MaintenanceTask

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class Dump:
    """Answers the route; `state` is also for a dump by signal."""

    def __init__(self, worker: WorkerView) -> None:
        self._worker = worker
        self._started = time.monotonic()

    async def answer(self, body: Body) -> Answer:
        read_nothing(body)
        return self.state()

    def state(self) -> Answer:
        sections: Mapping[str, Callable[[], object]] = {
            "host": self._host,
            "versions": lambda: dict(self._worker.versions),
            "vmm_versions": self._worker.vmm_versions.summary,
            "commands": self._commands,
            "lanes": self._lanes,
            "locks": self._locks,
            "slots": self._slots,
            "journal": self._journal,
            "connections": self._connections,
            "instances": self._instances,
            "networks": self._networks,
            "unrecorded_vmms": self._unrecorded,
            "left_behind": self._left_behind,
            "quarantined": self._quarantined,
            "threads": _threads,
            "tasks": _tasks,
        }
        return {"v": 1} | {name: _guarded(name, read) for name, read in sections.items()}

    async def on_signal(self, requested: asyncio.Event, run: str) -> None:
        """Write the state to a file in `run` each time that `requested` is set; until cancelled."""
        while True:
            await requested.wait()
            requested.clear()
            path = f"{run}/{FILE}"
            try:
                await asyncio.to_thread(_write, path, encode(self.state()))
            except (OSError, TypeError) as error:
                log.error("dump.write_failed", path=path, error=str(error))  # noqa: TRY400
            else:
                log.info("dump.written", path=path)

    # -- sections ------------------------------------------------------------------------------

    def _host(self) -> object:
        store = self._worker.journal.store
        return {
            "host_id": store.subjects.host_id,
            "journal_id": store.journal_id,
            "pid": os.getpid(),
            "uptime_s": int(time.monotonic() - self._started),
            "open_descriptors": len(os.listdir("/proc/self/fd")),
            **self._worker.facts(),
            "checks": dict(self._worker.checks()),
        }

    def _commands(self) -> object:
        work = {
            item.row.id: item
            for running, waiting in self._worker.lanes.work().values()
            for item in (running, *waiting)
            if isinstance(item, Work)
        }
        rows = self._worker.journal.commands.unfinished()
        rows = sorted(rows, key=lambda row: not _runs(work.get(row.id)))
        shown = [_command(row, work.get(row.id)) for row in rows[:SHOWN]]
        return {"count": len(rows), "shown": shown, "left_out": max(0, len(rows) - SHOWN)}

    def _lanes(self) -> object:
        lanes = sorted(self._worker.lanes.work().items(), key=lambda each: str(each[0]))
        return _cut(lanes, lambda each: _lane(*each))

    def _locks(self) -> object:
        return _cut(
            [*self._worker.locks.states().items()],
            lambda each: {
                "tenant_id": each[0] or None,
                "held": "exclusively" if each[1][0] < 0 else f"{each[1][0]} times",
                "waiting": each[1][1],
            },
        )

    def _slots(self) -> object:
        slots = self._worker.slots
        kinds = {name: getattr(slots, name) for name in Slots.__dataclass_fields__}
        return {name: _slots_of(kind) for name, kind in kinds.items()}

    def _journal(self) -> object:
        journal = self._worker.journal
        return {
            "writable": journal.store.writable,
            "seq": journal.store.seq,
            "unsent": {kind: journal.outbox.count(kind) for kind in OUT_KINDS},
            "unsent_state_keys": len(journal.outbox.dirty()),
            "held": journal.outbox.held,
            "backlogged": journal.outbox.backlogged,
        }

    def _connections(self) -> object:
        bus = self._worker.bus
        return {
            "bus": {
                "connected": bus.connected,
                "trouble": bus.trouble or None,
                "reconnects": bus.reconnects,
                "permission_errors": bus.permission_errors,
                "pulls": bus.pulls,
                "acknowledgements_stuck": bus.ack_window.stuck,
            }
        }

    def _instances(self) -> object:
        records = sorted(self._worker.journal.records.instances(), key=lambda each: each.ref)
        return {
            "count": len(records),
            "shown": [described(record) for record in records[:SHOWN]],
            "left_out": max(0, len(records) - SHOWN),
        }

    def _networks(self) -> object:
        records = self._worker.journal.records.networks()
        records = sorted(records, key=lambda each: each.tenant_id)
        return {
            "count": len(records),
            "shown": [msgspec.to_builtins(record) for record in records[:SHOWN]],
            "left_out": max(0, len(records) - SHOWN),
        }

    def _unrecorded(self) -> object:
        """VMMs that no record explains, of the last look."""
        return _cut(self._worker.unrecorded.vmms, lambda each: each.as_map())

    def _left_behind(self) -> object:
        leftovers = self._worker.journal.steps.leftovers()
        rows = [(command_id, row) for command_id, found in leftovers.items() for row in found]
        return _cut(
            rows,
            lambda each: {"command_id": each[0], "step": each[1].mechanism, "key": each[1].key},
        )

    def _quarantined(self) -> object:
        """Rows of the journal that this version cannot read, by table and key."""
        quarantine = self._worker.journal.quarantine
        rows = quarantine.rows()[:SHOWN]
        count = sum(quarantine.counts().values())
        return {
            "count": count,
            "shown": [{"table": r.table, "key": r.key, "reason": r.reason} for r in rows],
            "left_out": max(0, count - len(rows)),
        }


def _write(path: str, data: bytes) -> None:
    """Root-only, and whole or not at all."""
    with open(f"{path}.tmp", "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)
    os.rename(f"{path}.tmp", path)


def _guarded(name: str, read: Callable[[], object]) -> object:
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - logged; the rest is answered
        log.warning("dump.section_failed", section=name, error=repr(error))
        return {"error": repr(error)}


def _runs(work: Work | None) -> bool:
    return work is not None and work.steps is not None


def _command(row: CommandRow, work: Work | None) -> Mapping[str, object]:
    steps = work.steps if work is not None else None
    now_s = time.perf_counter()
    facts: dict[str, object] = {
        "id": row.id,
        "type": row.command.request.kind,
        "lane": str(row.lane),
        "state": "running" if steps is not None else "waiting",
        "attempts": row.attempts,
        "received_at_ms": row.received_at_ms,
        "deadline_ms": row.command.deadline_ms,
        "issuer": row.command.issuer,
    }
    if steps is not None:
        facts["steps_taken"] = len(steps.taken)
        facts["doing"] = [
            {"step": name, "since_s": round(now_s - began_s, 3)} for name, began_s in steps.doing
        ]
        facts["past_point_of_no_return"] = steps.control.final
    if work is not None and work.superseded_by is not None:
        facts["superseded_by"] = work.superseded_by
    return facts


def _lane(lane: Lane, work: tuple[Item | None, Sequence[Item]]) -> Mapping[str, object]:
    running, waiting = work
    return {
        "lane": str(lane),
        "running": None if running is None else _name(running),
        "waiting": [_name(item) for item in waiting],
    }


def _name(item: Item) -> str:
    return item.row.id if isinstance(item, Work) else f"maintenance: {item.name}"


def _slots_of(slots: FairSlots) -> Mapping[str, object]:
    return {
        "count": slots.count,
        "share": slots.share,
        "held": slots.holders(),
        "waiting": slots.waiting,
    }


def _threads() -> object:
    return [
        {"name": thread.name, "native_id": thread.native_id, "at": frames_of(thread)}
        for thread in threading.enumerate()
    ]


def _tasks() -> object:
    tasks = sorted(asyncio.all_tasks(), key=lambda task: task.get_name())
    return _cut(tasks, lambda task: {"name": task.get_name(), "at": _task_stack(task)})


def _task_stack(task: asyncio.Task[Any]) -> Sequence[str]:
    """The innermost frames of its coroutines, innermost first; `get_stack` reads no source."""
    found: list[str] = []
    awaited: Any = task.get_coro()
    while awaited is not None and hasattr(awaited, "cr_code"):
        line = awaited.cr_frame.f_lineno if awaited.cr_frame is not None else 0
        file = os.path.basename(awaited.cr_code.co_filename)
        found.append(f"{file}:{line} {awaited.cr_code.co_qualname}")
        awaited = awaited.cr_await
    return found[: -FRAMES - 1 : -1]


def _cut(items: Sequence[T], shown: Callable[[T], object]) -> dict[str, object]:
    return {
        "count": len(items),
        "shown": [shown(each) for each in items[:SHOWN]],
        "left_out": max(0, len(items) - SHOWN),
    }
