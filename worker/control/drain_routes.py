"""The routes of `hostd drain` and `hostd undrain`."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Annotated, Final

import msgspec

from handlers.errors import Conflict
from worker.control.draining import DrainSwitch, Mode
from worker.control.emptying import Emptying
from worker.control.routes import Answer, Body, read_body

LEFT_SHOWN: Final = 1000
PROGRESS_EVERY_S: Final = 10.0
TIMEOUT_MAX_S: Final = 7 * 24 * 3600.0


class _Drain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: Mode = "wait"
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=TIMEOUT_MAX_S)] | None = None


class _Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class DrainRoutes:
    """Begins, follows and ends a drain.

    Args:
        lift: ends the quarantine of launches, for a reason; returns whether there was one.
    """

    def __init__(
        self,
        switch: DrainSwitch,
        emptying: Emptying,
        *,
        lift: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._switch, self._emptying, self._lift = switch, emptying, lift

    async def drain(self, body: Body) -> AsyncGenerator[Answer]:
        """Begin a drain and follow it until it can do no more, or for `timeout_s`.

        The drain itself goes on after a timeout, and when the client goes away.

        Raises:
            Conflict: the drain was replaced or ended by somebody else meanwhile.
        """
        wanted = read_body(body, _Drain)
        drain = await self._switch.begin(wanted.mode)
        loop = asyncio.get_running_loop()
        until = None if wanted.timeout_s is None else loop.time() + wanted.timeout_s
        while True:
            if self._switch.active != drain:
                raise Conflict(f"the drain {drain.id} was ended or replaced by another request")
            seen = self._emptying.looks
            yield {"progress": {"mode": drain.mode, **self._emptying.counts()}}
            left_s = None if until is None else until - loop.time()
            if self._emptying.ended or (left_s is not None and left_s <= 0):
                break
            wait_s = PROGRESS_EVERY_S if left_s is None else min(PROGRESS_EVERY_S, left_s)
            await self._emptying.wait_look(seen, wait_s)
        yield {"result": self._state()}

    async def undrain(self, body: Body) -> Answer:
        read_body(body, _Nothing)
        return {
            "was_draining": await self._switch.end(),
            "was_quarantined": await self._lift("an operator: undrain"),
        }

    async def state(self, body: Body) -> Answer:
        read_body(body, _Nothing)
        return self._state()

    def _state(self) -> Answer:
        drain, counts = self._switch.active, self._emptying.counts()
        return {
            "draining": drain is not None,
            "mode": None if drain is None else drain.mode,
            "since_ms": None if drain is None else drain.since_ms,
            "empty": counts["in_use"] == 0,
            **counts,
            "left": self._emptying.left(LEFT_SHOWN),
        }
