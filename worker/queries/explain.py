"""`hostd explain` and `ask.explain`: what a command that came now would do, and why. No effect.

Asked in the order of a command's path: intake (does it decode, is there room), the lane (what is
before it), dispatch (does the host begin it), the handler (`handlers/explain/plan.py`). Each of
these answers with the code that decides when the command really comes.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from handlers.errors import Failure, Invalid, Unavailable
from handlers.explain.plan import Plan, PlannedStep, plan
from handlers.interfaces import Host
from handlers.precedence import Precedence, precedence
from schemas import serde
from schemas.decode_error import DecodeError
from schemas.requests import Ping, Request
from schemas.subjects import Lane
from worker.journal.admission import too_many
from worker.journal.journal import Journal
from worker.lanes import Lanes, Work

EXPLAIN_S: Final = 5.0  # of one answer, the wait for its turn included
BEFORE_SHOWN: Final = 20

Answer = Mapping[str, object]


class Begins(Protocol):
    """`worker.dispatch.Dispatch`, as far as it is asked."""

    def would_refuse(self, request: Request, lane: Lane) -> Failure | None: ...


class Explain:
    """Explains one command at a time.

    Args:
        ready: whether recovery is complete.
    """

    def __init__(
        self, host: Host, journal: Journal, lanes: Lanes, begins: Begins, ready: Callable[[], bool]
    ) -> None:
        self._host = host
        self._journal = journal
        self._lanes = lanes
        self._begins = begins
        self._ready = ready
        self._turn = asyncio.Lock()

    async def explain(self, raw: object) -> Answer:
        """The answer for a request as it is in a command's envelope.

        Raises:
            Unavailable: the worker recovers, or is too busy with other questions.
        """
        try:
            request = serde.read_request(raw, "$.request").value
        except DecodeError as error:
            return _refused_by_intake(error)
        if not self._ready():
            raise Unavailable("cannot explain: the worker is still recovering, try again")
        try:
            async with asyncio.timeout(EXPLAIN_S), self._turn:
                return await self._explain(request)
        except TimeoutError as error:
            raise Unavailable(
                f"cannot explain within {EXPLAIN_S:g} s: files, kernel or other questions are slow"
            ) from error

    async def _explain(self, request: Request) -> Answer:
        lane = Lane.of_request(request)
        before = () if isinstance(request, Ping) else self._before(request, lane)
        about: dict[str, object] = {
            "v": 1,
            "type": request.kind,
            "lane": str(lane),
            "before": before[:BEFORE_SHOWN],
            "provisional": bool(before),
        }
        if isinstance(request, Ping):
            return about | _outcome(why="it is answered at once, by no lane")
        waits = () if self._journal.store.writable else ("the journal, which cannot commit",)
        commands = self._journal.commands
        full = commands.limit_reached(request, lane)
        refused: Failure | None = self._begins.would_refuse(request, lane)
        if full is not None:  # decided first, by intake
            refused = too_many(full, lane, commands.limits)
        if refused is not None:
            return about | _outcome(waits=waits, refused=refused)
        return about | _planned(await plan(request, self._host), waits)

    def _before(self, request: Request, lane: Lane) -> Sequence[Answer]:
        """The commands of its lane that have not ended, in their order, and what it does to them.

        A command that waits and is superseded is answered without being run.
        """
        running, waiting = self._lanes.work().get(lane, (None, ()))
        return [
            {
                "id": each.row.id,
                "type": each.row.command.request.kind,
                "state": "running" if each is running else "waiting",
                "effect": (
                    Precedence.WAITS
                    if each.superseded_by is not None
                    else precedence(each.row.command.request, request)
                ).value,
            }
            for each in (running, *waiting)
            if isinstance(each, Work)
        ]


def _planned(planned: Plan, waits: Sequence[str]) -> dict[str, object]:
    done = planned.done
    if done is None:
        return _outcome(
            waits=(*waits, *planned.waits), steps=planned.steps, refused=planned.failure
        )
    why = None
    if not done.changed:
        why = "there is nothing of it" if done.status is None else f"it is {done.status} already"
    return _outcome(
        waits=(*waits, *planned.waits),
        steps=planned.steps,
        changes=done.changed,
        status=done.status,
        why=why,
    )


def _outcome(
    *,
    waits: Sequence[str] = (),
    steps: Sequence[PlannedStep] = (),
    refused: Failure | None = None,
    changes: bool = False,
    status: str | None = None,
    why: str | None = None,
) -> dict[str, object]:
    return {
        "refused": None if refused is None else _failure(refused),
        "changes": changes,
        "status": status,
        "why": why,
        "waits": list(waits),
        "steps": [
            {
                "name": step.name,
                "outcome": step.outcome,
                **({} if step.key is None else {"key": step.key, "there": step.there}),
            }
            for step in steps
        ],
    }


def _failure(failure: Failure) -> Answer:
    """As in a reply."""
    path = {} if failure.path is None else {"path": failure.path}
    return {
        "code": failure.code.value,
        "message": failure.message,
        "retryable": failure.retryable,
        "detail": {**failure.detail, "act": failure.act, **path},
    }


def _refused_by_intake(error: DecodeError) -> Answer:
    """It has no type that could be relied on, and no lane."""
    nothing: Sequence[Answer] = ()
    refused = {**_failure(Invalid(str(error), path=error.path)), "code": error.code.value}
    return {
        "v": 1,
        "type": None,
        "lane": None,
        "before": nothing,
        "provisional": False,
        **_outcome(),
        "refused": refused,
    }
