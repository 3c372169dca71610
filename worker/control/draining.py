"""Whether this host takes new VMs: the operator's `drain`, kept in the journal until `undrain`.

While it drains, a Start or Wake that has not begun is answered `draining`; every other command is
run. What puts running instances to sleep, or stops them, is `emptying.py`.
"""

import secrets
from collections.abc import Callable
from typing import Final, Literal

import msgspec
import structlog

from handlers.cancellation import run_shielded
from handlers.errors import Draining, Failure
from schemas.envelopes import EventKind
from schemas.requests import Request, StartInstance, WakeInstance
from schemas.subjects import Lane
from worker.journal.journal import Journal
from worker.journal.transaction import EventDraft

KEY: Final = "drain"
Mode = Literal["wait", "sleep", "stop"]
NEW_VMS: Final = (StartInstance, WakeInstance)

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class Drain(msgspec.Struct, frozen=True):
    """One drain. `id` is part of the IDs of its commands; `since_ms`: Unix milliseconds."""

    mode: Mode
    id: str
    since_ms: int


class DrainSwitch:
    """The drain in effect, or None. A change is committed before it is in effect."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._watchers: list[Callable[[], None]] = []
        self.active = _read(journal.store.meta(KEY))

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` when a drain began or ended."""
        self._watchers.append(changed)

    async def begin(self, mode: Mode) -> Drain:
        """Drain from now on; a drain in effect is replaced, and what it could not do tried again.

        Raises:
            JournalFault: nothing has changed.
        """
        drain = Drain(mode, secrets.token_hex(4), self._journal.store.now_ms())
        await run_shielded(self._change(drain, drain))
        return drain

    async def end(self) -> bool:
        """Take new VMs again; false if there was no drain.

        Raises:
            JournalFault: nothing has changed.
        """
        if self.active is None:
            return False
        await run_shielded(self._change(None, self.active))
        return True

    def refusal(self, request: Request) -> Failure | None:
        """Why a command that has not begun is not run; None: it is."""
        if self.active is None or not isinstance(request, NEW_VMS):
            return None
        return Draining(
            "this host is being drained and starts no VM: use another host; an operator ends it "
            "with `hostd undrain`",
            detail={"mode": self.active.mode, "since_ms": self.active.since_ms},
        )

    async def _change(self, active: Drain | None, subject: Drain) -> None:
        """Commit it, let it take effect, and announce it: also if who asked for it has gone."""
        kept = "" if active is None else msgspec.json.encode(active).decode()
        begun = active is not None
        event = EventDraft(
            EventKind.DRAIN,
            Lane.host(),
            reason="the host is drained" if begun else "the drain was ended",
            detail={"active": begun, "mode": subject.mode, "drain": subject.id},
        )
        await self._journal.store.put_meta(KEY, kept, event=event)
        self.active = active
        for changed in self._watchers:
            changed()
        if begun:
            log.info("drain.begun", mode=subject.mode, drain=subject.id)
        else:
            log.info("drain.ended", mode=subject.mode, drain=subject.id)


def _read(kept: str | None) -> Drain | None:
    """The drain that the journal keeps. One that does not decode is a drain, without a mode."""
    if not kept:
        return None
    try:
        return msgspec.json.decode(kept, type=Drain)
    except msgspec.MsgspecError as error:
        log.error("drain.unreadable", row=kept, error=str(error))  # noqa: TRY400
        return Drain("wait", "unreadable", 0)
