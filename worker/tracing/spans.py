"""Spans as values, made of what a command left behind: its reply, its steps and their times.

No span exists while its work is done: all of a command are made after its reply was committed, so a
trace costs the command nothing but a few readings of the clock.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from schemas.codes import Code
from schemas.envelopes import Reply
from schemas.requests import Error
from schemas.subjects import Lane
from schemas.trace_context import TraceContext

MESSAGE_MAX: Final = 500  # characters of an error message

Attributes = Mapping[str, str | int | bool]


class Span(NamedTuple):
    """One span that ended. `kind`: consumer, internal or producer; times are Unix nanoseconds.

    `error` is what its status says, or None: it succeeded. `links`: spans that led to it.
    """

    context: TraceContext
    parent: TraceContext | None
    name: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: Attributes
    error: str | None = None
    links: tuple[TraceContext, ...] = ()


@dataclass(frozen=True, slots=True)
class Answered:
    """A command and its answer. `type` is that of the request, or `unknown`."""

    context: TraceContext
    parent: TraceContext | None
    type: str
    lane: Lane
    reply: Reply
    workspace_id: str | None = None


def child_of(parent: TraceContext) -> TraceContext:
    """The context of a new span below this one."""
    return parent._replace(span_id=secrets.token_hex(8))


def command_span(answered: Answered, end_ns: int, *, recovered: bool = False) -> Span:
    """From the arrival at this host until the reply was committed, over all of its workers.

    Attributes: names and codes, never what a request or a guest contains.
    """
    reply, lane = answered.reply, answered.lane
    found: dict[str, str | int | bool | None] = {
        "hostd.command.id": reply.id,
        "hostd.command.type": answered.type,
        **lane_attributes(lane),
        "hostd.workspace.id": answered.workspace_id,
        "hostd.code": reply.code.value,
        "hostd.act": str(act) if (act := reply.detail.get("act")) else None,
        "hostd.changed": reply.changed,
        "hostd.attempts": reply.attempts,
        "hostd.left_behind": len(reply.left_behind) or None,
        "hostd.recovered": recovered or None,
        "messaging.system": "nats",
        "messaging.operation.type": "process",
        "messaging.message.id": reply.id,
    }
    error = None
    if reply.code is not Code.OK:
        message = reply.response.message if isinstance(reply.response, Error) else ""
        error = f"{reply.code.value}: {message}"[:MESSAGE_MAX]
    return Span(
        answered.context,
        answered.parent,
        answered.type,
        "consumer",
        min(reply.received_at_ms * 1_000_000, end_ns),
        end_ns,
        {name: value for name, value in found.items() if value is not None},
        error,
    )


def lane_attributes(lane: Lane) -> dict[str, str | int | bool | None]:
    """Whose it is; None of what the lane does not have."""
    return {
        "hostd.lane": str(lane),
        "hostd.tenant.id": lane.tenant_id,
        "hostd.pool.id": lane.ref.pool_id if lane.ref else None,
        "hostd.instance.id": lane.ref.instance_id if lane.ref else None,
    }


def inner_span(
    parent: TraceContext,
    name: str,
    start_ns: int,
    end_ns: int,
    attributes: Attributes,
    error: str | None = None,
) -> Span:
    """A span of this worker's own work below another one."""
    start_ns = min(start_ns, end_ns)
    return Span(child_of(parent), parent, name, "internal", start_ns, end_ns, attributes, error)
