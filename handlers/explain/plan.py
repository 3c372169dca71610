"""Plan a command: run its handler, with its admission and its steps, on a host of predictions.

The handler is the one that executes, so a plan cannot differ from it in what it decides or in the
order of its steps. What a mechanism finds only while it works (a file of another owner, damaged
memory, a guest that does not answer) is not foreseen: every step is taken to succeed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.errors import Failure, of_os_error
from handlers.explain.readonly import Seen, readonly_host
from handlers.interfaces import Host
from handlers.mechanism import StepIntent, StepRow
from handlers.registry import HANDLERS
from handlers.steps import Done, Steps
from schemas.envelopes import StepTaken
from schemas.requests import Request

COMMAND_ID = "explain:"  # `:` is in no command's ID


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """`outcome` as in a reply: `done`, `found`, or `failed` if the command is refused there. Of a
    step that makes or removes a resource, `key` names it and `there` is whether it exists now."""

    name: str
    outcome: str
    key: str | None = None
    there: bool | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Exactly one of `done` and `failure` is set. `waits`: locks and slots that others hold now."""

    steps: tuple[PlannedStep, ...]
    waits: tuple[str, ...]
    done: Done | None = None
    failure: Failure | None = None


class MemoryLog:
    """The step log of a command that is in no journal."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], StepRow] = {}
        self._marks: set[str] = set()

    async def begin(self, command_id: str, *intents: StepIntent) -> Sequence[StepRow]:  # noqa: ARG002
        found: list[StepRow] = []
        for each in intents:
            row = StepRow(each.mechanism, each.key, each.existed)
            found.append(self._rows.setdefault((each.mechanism, each.key), row))
        return found

    async def forget(self, command_id: str, mechanism: str, key: str) -> None:  # noqa: ARG002
        self._rows.pop((mechanism, key), None)

    def rows(self, command_id: str) -> Sequence[StepRow]:  # noqa: ARG002
        return tuple(self._rows.values())

    async def mark(self, command_id: str, name: str) -> None:  # noqa: ARG002
        self._marks.add(name)

    def marked(self, command_id: str, name: str) -> bool:  # noqa: ARG002
        return name in self._marks


async def plan(request: Request, host: Host) -> Plan:
    """What the handler of this command would do now. Changes nothing, asks no VMM and no guest."""
    seen = Seen()
    log = MemoryLog()
    steps = Steps(COMMAND_ID, log, {})
    done: Done | None = None
    failure: Failure | None = None
    try:
        done = await HANDLERS[type(request)](request, steps, readonly_host(host, seen))
    except Failure as error:
        failure = error
    except OSError as error:
        failure = of_os_error(error)
    rows = {row.mechanism: (row.key, row.existed) for row in log.rows(COMMAND_ID)}
    found = rows | seen.found
    planned = tuple(_planned(each, found.get(each.name)) for each in steps.taken)
    return Plan(planned, tuple(dict.fromkeys(seen.waits)), done, failure)


def _planned(step: StepTaken, found: tuple[str, bool] | None) -> PlannedStep:
    key, there = found or (None, None)
    return PlannedStep(step.name, step.outcome, key, there)
