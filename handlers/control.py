"""When a running command has to end: a later command, its deadline, the worker's shutdown.

Nothing here cancels a step. A command ends at a *safe point*, before its next step, or while it
waits for something that may be abandoned. Past a point of no return neither a later command nor
the deadline ends it; a shutdown does, and the next worker completes it.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from handlers.cancellation import Interrupted, race
from handlers.clock import now_ms
from handlers.errors import Expired, Superseded

T = TypeVar("T")


class Halted(Exception):
    """The worker shuts down: stop here, undo nothing, reply nothing; the next worker continues.

    Not a `Failure`: handlers must let it pass.
    """


class Control:
    """What may end one run of one command.

    Args:
        deadline_ms: absolute, Unix milliseconds, or None.
        clock_ms: the clock that the deadline is compared with.
    """

    def __init__(
        self, deadline_ms: int | None = None, clock_ms: Callable[[], int] = now_ms
    ) -> None:
        self._deadline_ms = deadline_ms
        self._clock_ms = clock_ms
        self._interrupt = asyncio.Event()
        self._hurry = asyncio.Event()
        self._superseded_by = ""
        self._halted = False
        self.final = False

    def finalize(self) -> None:
        """From here on the command is completed, never undone."""
        self.final = True
        if self._superseded_by:
            self.hurry()

    def supersede(self, by: str) -> None:
        """End the command at its next safe point; past its point of no return `hurry` it."""
        self._superseded_by = by
        self._interrupt.set()
        if self.final:
            self.hurry()

    def hurry(self) -> None:
        """End the waits that only spare the guest; the command goes on with its next step."""
        self._hurry.set()

    async def unhurried(self, do: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """Wait for `do`, which gives a guest time, until `hurry`; None if that ended the wait, or
        came before it: then `do` does not begin."""
        if self._hurry.is_set():
            return None
        try:
            return await race(do(), self._hurry.wait())
        except Interrupted:
            return None

    def halt(self) -> None:
        """Stop the command at its next safe point, to be continued by the next worker."""
        self._halted = True
        self._interrupt.set()

    def safe_point(self) -> None:
        """Raise if the command has to end here.

        Raises:
            Halted: the worker shuts down.
            Superseded, Expired: unless the command is final.
        """
        if self._halted:
            raise Halted
        if self.final:
            return
        if self._superseded_by:
            raise Superseded(
                f"superseded by {self._superseded_by}", detail={"by": self._superseded_by}
            )
        left_s = self.left_s()
        if left_s is not None and left_s <= 0:
            raise Expired("the deadline passed before the command completed")

    def left_s(self) -> float | None:
        """Seconds until the deadline, or None."""
        if self._deadline_ms is None:
            return None
        return (self._deadline_ms - self._clock_ms()) / 1000

    async def interruptible(self, step: str, do: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for `do`, but no longer than the command may run; then cancel it.

        Raises:
            Superseded, Expired, Halted: the wait was interrupted.
        """
        try:
            return await race(do(), self._interrupt.wait(), timeout_s=self.left_s())
        except Interrupted as error:
            self.safe_point()
            raise Expired("the deadline passed while waiting", detail={"step": step}) from error

    async def pause(self, seconds: float) -> None:
        """Wait between two attempts; whatever ends the command ends the wait.

        Raises:
            Superseded, Expired, Halted: see `safe_point`.
        """
        if self.final and not self._halted:
            await asyncio.sleep(seconds)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._interrupt.wait()
        self.safe_point()
