"""`hostd explain` and `ask.explain`: what a command that came now would do, and why. No effect.

Asked in the order of a command's path: intake (does it decode, is there room), the lane (what is
before it), dispatch (does the host begin it), the handler (`handlers/explain/plan.py`). Each of
these answers with the code that decides when the command really comes.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, cast

from handlers.errors import Failure, Invalid, Unavailable
from handlers.explain.plan import PlannedStep, plan
from handlers.interfaces import Host
from handlers.precedence import Precedence, precedence
from handlers.steps import Done
from schemas import serde
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.protocol.queries import (
    CommandBefore,
    Effect,
    ExplainAnswer,
    ExplainedStep,
    PlannedOutcome,
    Refusal,
)
from schemas.requests import Ping, Request
from schemas.subjects import Lane
from worker.journal.admission import too_many
from worker.journal.journal import Journal
from worker.lanes import Lanes, Work

EXPLAIN_S: Final = 5.0  # of one answer, the wait for its turn included
BEFORE_SHOWN: Final = 20

EFFECTS: Final[Mapping[Precedence, Effect]] = {
    Precedence.WAITS: "waits",
    Precedence.SUPERSEDES: "supersedes",
    Precedence.HURRIES: "hurries",
}


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

    async def explain(self, raw: object) -> ExplainAnswer:
        """The answer for a request as it is in a command's envelope.

        Raises:
            Unavailable: the worker recovers, or is too busy with other questions.
        """
        try:
            request = serde.read_request(raw, "$.request").value
        except DecodeError as error:
            # By intake: it has no type that could be relied on, and no lane.
            refused = _refusal(Invalid(str(error), path=error.path), error.code)
            return _answer(None, None, refused=refused)
        if not self._ready():
            raise Unavailable("cannot explain: the worker is still recovering, try again")
        try:
            async with asyncio.timeout(EXPLAIN_S), self._turn:
                return await self._explain(request)
        except TimeoutError as error:
            raise Unavailable(
                f"cannot explain within {EXPLAIN_S:g} s: files, kernel or other questions are slow"
            ) from error

    async def _explain(self, request: Request) -> ExplainAnswer:
        lane = Lane.of_request(request)
        if isinstance(request, Ping):
            return _answer(request.kind, lane, why="it is answered at once, by no lane")
        before = self._before(request, lane)
        waits = () if self._journal.store.writable else ("the journal, which cannot commit",)
        commands = self._journal.commands
        full = commands.limit_reached(request, lane)
        refused: Failure | None = self._begins.would_refuse(request, lane)
        if full is not None:  # decided first, by intake
            refused = too_many(full, lane, commands.limits)
        if refused is not None:
            return _answer(request.kind, lane, before, waits, refused=_refusal(refused))
        found = await plan(request, self._host)
        waits = (*waits, *found.waits)
        if found.failure is not None:
            refused_there = _refusal(found.failure)
            return _answer(request.kind, lane, before, waits, found.steps, refused=refused_there)
        return _answer(request.kind, lane, before, waits, found.steps, done=found.done)

    def _before(self, request: Request, lane: Lane) -> list[CommandBefore]:
        """The commands of its lane that have not ended, in their order, and what it does to them.

        A command that waits and is superseded is answered without being run.
        """
        running, waiting = self._lanes.work().get(lane, (None, ()))
        return [
            {
                "id": each.row.id,
                "type": each.row.command.request.kind,
                "state": "running" if each is running else "waiting",
                "effect": EFFECTS[
                    Precedence.WAITS
                    if each.superseded_by is not None
                    else precedence(each.row.command.request, request)
                ],
            }
            for each in (running, *waiting)
            if isinstance(each, Work)
        ]


def _answer(
    kind: str | None,
    lane: Lane | None,
    before: Sequence[CommandBefore] = (),
    waits: Sequence[str] = (),
    steps: Sequence[PlannedStep] = (),
    *,
    refused: Refusal | None = None,
    done: Done | None = None,
    why: str | None = None,
) -> ExplainAnswer:
    if done is not None and not done.changed:
        why = "there is nothing of it" if done.status is None else f"it is {done.status} already"
    return {
        "v": 1,
        "type": kind,
        "lane": None if lane is None else str(lane),
        "before": list(before[:BEFORE_SHOWN]),
        "provisional": bool(before),
        "refused": refused,
        "changes": done is not None and done.changed,
        "status": None if done is None else done.status,
        "why": why,
        "waits": list(waits),
        "steps": [_step(each) for each in steps],
    }


def _step(planned: PlannedStep) -> ExplainedStep:
    # A plan undoes nothing, so no step of it is `undone`.
    step: ExplainedStep = {
        "name": planned.name,
        "outcome": cast("PlannedOutcome", planned.outcome),
    }
    if planned.key is not None:
        step["key"], step["there"] = planned.key, planned.there
    return step


def _refusal(failure: Failure, code: Code | None = None) -> Refusal:
    """As in a reply."""
    path = {} if failure.path is None else {"path": failure.path}
    return {
        "code": code or failure.code,
        "message": failure.message,
        "retryable": failure.retryable,
        "detail": {**failure.detail, "act": failure.act, **path},
    }
