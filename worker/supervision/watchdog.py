"""Feeds the service manager's watchdog, as long as everything that a command needs moves.

What is looked at: the event loop, since this runs on it; the journal's thread, which has to answer
between two commits; the pull, whose loop has to turn. A disk that reports errors, a broker that is
away and a lane whose command hangs are no reason to restart: the worker handles them itself, and
they would be there after a restart too.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import structlog

from handlers.thread_stack import stack_of
from worker.bus.nats import NatsBus
from worker.journal.store import Store
from worker.supervision.service_manager import ServiceManager

EVERY_S: Final = 5.0
FEEDS: Final = 3  # within the manager's limit
PATIENCE_S: Final = 20.0  # until a part that does not move is logged

log = structlog.get_logger()


class Part(Protocol):
    """A part of the worker that can hang."""

    def ask(self) -> None:
        """Ask it for a sign of life."""
        ...

    def moved(self) -> bool:
        """Whether it has given one since it was asked; an attempt that failed is one."""
        ...

    def where(self) -> str:
        """What it is doing, for the log."""
        ...


class JournalPart:
    """The journal's thread: it answers a question between two commits."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._answer: asyncio.Future[None] | None = None

    def ask(self) -> None:
        self._answer = self._store.writer.read(lambda tx: None)
        self._answer.add_done_callback(lambda done: done.cancelled() or done.exception())

    def moved(self) -> bool:
        return self._answer is None or self._answer.done()

    def where(self) -> str:
        return stack_of(self._store.writer.thread)


class PullPart:
    """The loop that pulls commands: it turns, with or without a connection."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self._turns: int | None = None

    def ask(self) -> None:
        self._turns = self._bus.turns

    def moved(self) -> bool:
        return self._turns is None or self._bus.turns != self._turns

    def where(self) -> str:
        return "connected" if self._bus.connected else "not connected"


class Watchdog:
    """Until cancelled: reports the status, and signs of life while all parts give them.

    Args:
        parts: by name. One that has not answered is asked again only once it has.
        status: one line, for `systemctl status`.
        every_s: how often the parts are asked, if the manager's limit is not shorter.
        patience_s: when a part that has not answered is logged, with what it is doing.
    """

    def __init__(
        self,
        manager: ServiceManager,
        parts: Mapping[str, Part],
        status: Callable[[], str],
        *,
        every_s: float = EVERY_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        limit_s = manager.watchdog_s
        self._every_s = every_s if limit_s is None else min(every_s, limit_s / FEEDS)
        self._patience_s = patience_s if limit_s is None else min(patience_s, limit_s / 2)
        self._manager = manager
        self._parts = parts
        self._status = status
        self._silent_s: dict[str, float] = {}
        self._told = ""

    @property
    def stuck(self) -> tuple[str, ...]:
        """The parts that have given no sign of life for too long."""
        late = (name for name, silent_s in self._silent_s.items() if silent_s >= self._patience_s)
        return tuple(sorted(late))

    async def run(self) -> None:
        """Without a service manager too: what hangs is logged all the same."""
        while True:
            await self.turn()

    async def turn(self) -> None:
        """Ask the parts, give them `every_s`, and feed if all have answered."""
        for name, part in self._parts.items():
            if name not in self._silent_s:
                part.ask()
        await asyncio.sleep(self._every_s)
        before = self.stuck
        self._silent_s = {
            name: self._silent_s.get(name, 0.0) + self._every_s
            for name, part in self._parts.items()
            if not part.moved()
        }
        for name in set(self.stuck).difference(before):
            log.error("watchdog.stuck", part=name, at=self._parts[name].where())
        for name in set(before).difference(self.stuck):
            log.warning("watchdog.moves_again", part=name)
        if not self._silent_s and self._manager.watchdog_s is not None:
            self._manager.alive()
        text = f"no sign of life: {', '.join(self.stuck)}" if self.stuck else self._status()
        if text != self._told:
            self._manager.status(text)
            self._told = text
