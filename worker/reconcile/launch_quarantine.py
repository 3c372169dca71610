"""The quarantine of launches: a host whose launches keep failing by its own fault takes no Starts.

Counted are launches (Start, Wake) in a row that failed with `host_fault` or `internal` in a step
that concerns the host alone: nothing that a tenant's files can cause. One that succeeds ends the
count and the quarantine. While it lasts, one Start is let through from time to time: the probe
launch. Kept in the journal, so that a worker that restarts does not begin to count again.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog

from handlers.errors import Failure, Quarantined
from schemas.codes import Code
from schemas.envelopes import EventKind, Reply, StepTaken
from schemas.records import Status
from schemas.requests import Request, StartInstance, WakeInstance
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.journal.memory import CommandRow
from worker.journal.transaction import EventDraft

META: Final = "launch_quarantine"
FIRST_PROBE_S: Final = 60.0
LAST_PROBE_S: Final = 900.0
HOSTS_CODES: Final = frozenset({Code.HOST_FAULT, Code.INTERNAL})
HOSTS_STEPS: Final = frozenset(
    {"flush_conntrack", "cgroup", "pin", "tap", "jail", "vmm", "check_confinement"}
)

log = structlog.get_logger()


class Since(msgspec.Struct, frozen=True):
    """What the journal keeps: when it began, after how many failures, and the last one."""

    since_ms: int
    failures: int
    step: str
    reason: str


class LaunchQuarantine:
    """`worker.dispatch.LaunchGate`.

    Args:
        after: how many failures in a row; 0 turns it off.
        changed: called when it began or ended.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        journal: Journal,
        after: int,
        *,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._after = after
        self._changed = changed
        self._clock = clock
        self._failures = 0
        self._since = _kept(journal) if after else None
        self._pause_s = FIRST_PROBE_S
        self._probe_at = clock() + FIRST_PROBE_S
        self._probe: str | None = None
        self._unsaved: tuple[str, EventDraft] | None = None

    @property
    def after(self) -> int:
        """How many failures in a row begin it; 0: it is turned off."""
        return self._after

    @property
    def failures(self) -> int:
        """Launches in a row that failed by the host's fault."""
        return self._failures

    @property
    def active(self) -> bool:
        return self._since is not None

    def refusal(self, row: CommandRow) -> Failure | None:
        """Why a command that has not begun is refused; one that is not may be the probe."""
        request = row.command.request
        if row.id == self._probe or not self._holds(request):
            return None
        refused = self.would_refuse(request)
        if refused is None:
            self._probe, self._probe_at = row.id, self._clock() + self._pause_s
            log.warning("launches.probed", command_id=row.id)
        return refused

    def _holds(self, request: Request) -> bool:
        """Whether the quarantine concerns it; a Start of what runs launches nothing."""
        if self._since is None or not isinstance(request, StartInstance):
            return False
        record = self._journal.records.instance(request.ref)
        return record is None or record.status is not Status.RUNNING

    def would_refuse(self, request: Request) -> Failure | None:
        """As `refusal` of a command that would come now. No effect."""
        since, left_s = self._since, self._probe_at - self._clock()
        if since is None or not self._holds(request) or left_s <= 0:
            return None
        return Quarantined(
            f"this host takes no Starts: {since.failures} launches in a row failed by its own "
            f"fault, the last in the step {since.step}: {since.reason}; use another host. "
            f"One Start is tried in {left_s:.0f} s",
            detail={"quarantined_since_ms": since.since_ms, "probe_in_s": int(left_s)},
        )

    async def finished(self, row: CommandRow, reply: Reply) -> None:
        """Judge the outcome of a command that ran."""
        await self._save()
        if not self._after or not isinstance(row.command.request, StartInstance | WakeInstance):
            return
        step = _failed_step(reply.steps)
        if reply.code is Code.OK and reply.changed:
            self._failures = 0
            await self.lift("a launch succeeded")
        elif reply.code in HOSTS_CODES and step in HOSTS_STEPS:
            await self._failed(row, reply, step)
        elif row.id == self._probe:
            self._probe_at = self._clock()  # it says nothing about the host: the next Start will
        if row.id == self._probe:
            self._probe = None

    async def lift(self, reason: str) -> bool:
        """End the quarantine, if there is one; whether there was."""
        self._failures = 0
        if self._since is None:
            return False
        self._since, self._pause_s = None, FIRST_PROBE_S
        log.info("launches.resumed", reason=reason)
        await self._announce(reason, quarantined=False)
        return True

    async def _failed(self, row: CommandRow, reply: Reply, step: str) -> None:
        self._failures += 1
        if self._since is not None:
            if row.id == self._probe:
                self._pause_s = min(self._pause_s * 2, LAST_PROBE_S)
                self._probe_at = self._clock() + self._pause_s
        elif self._failures >= self._after:
            message = getattr(reply.response, "message", "")
            self._since = Since(reply.finished_at_ms, self._failures, step, message)
            self._pause_s = FIRST_PROBE_S
            self._probe_at = self._clock() + FIRST_PROBE_S
            log.error("launches.quarantined", failures=self._failures, step=step, reason=message)
            await self._announce(message, quarantined=True, failures=self._failures, step=step)

    async def _announce(self, reason: str, *, quarantined: bool, **detail: object) -> None:
        self._changed()
        kept = "" if self._since is None else msgspec.json.encode(self._since).decode()
        event = EventDraft(
            EventKind.HOST,
            Lane.host(),
            reason=reason,
            detail={"launches_quarantined": quarantined, **detail},
        )
        self._unsaved = (kept, event)
        await self._save()

    async def _save(self) -> None:
        """Commit what the journal lacks; if it cannot now, after the next command."""
        if self._unsaved is None:
            return
        saved = self._unsaved
        with contextlib.suppress(Failure):  # in effect all the same
            await self._journal.store.put_meta(META, saved[0], event=saved[1])
            if self._unsaved is saved:
                self._unsaved = None


def _kept(journal: Journal) -> Since | None:
    text = journal.store.meta(META)
    try:
        return msgspec.json.decode(text, type=Since) if text else None
    except msgspec.MsgspecError:  # of another version: counted anew
        return None


def _failed_step(steps: Sequence[StepTaken]) -> str:
    """The step that ended the last attempt; those that it interrupted have failed after it."""
    found = ""
    for step in reversed(steps):
        if step.outcome == "failed":
            found = step.name
        elif step.outcome != "undone" or found:
            break
    return found
