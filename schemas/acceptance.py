"""Whether a worker takes a command message, before it knows the host.

The one place for these rules: intake journals what `judge` accepts, and `hostd decode` refuses what
it does not. The rules for a network that need no host are in `schemas/tenant_net.py`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from schemas import trace_context
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, Form
from schemas.partial import Undecodable, decode
from schemas.requests import Request
from schemas.subjects import Lane, check_reply_to
from schemas.trace_context import TraceContext


class Judged(NamedTuple):
    """A command, or why it is refused, with what an answer needs.

    `request` is None if it cannot be read: what is refused may have one.
    `id` is None if it cannot be read; `reply_to` is set only if hostd may publish there; `lane` is
    None if the subject has none. `owns_id`: the ID is that of a valid envelope, whatever else is
    wrong. `trace` is the envelope's, if it has a valid one; `trace_ignored` names its fields that
    were not taken (`trace_context.ignored`); the `tracestate` of what does not decode is not read.
    """

    content: Command | DecodeError
    request: Request | None
    id: str | None
    lane: Lane | None
    reply_to: str | None
    form: Form
    owns_id: bool
    trace: TraceContext | None
    trace_ignored: tuple[str, ...]


def judge(
    data: bytes, inbox_prefixes: Sequence[str], lane_of: Callable[[], Lane] | None = None
) -> Judged:
    """Decode and check a command message. An error in the subject comes before one in the bytes.

    Args:
        inbox_prefixes: `[nats] inbox_prefixes`; what a `reply_to` must begin with.
        lane_of: the lane of the subject, or DecodeError; None: without a check of the lane.
    """
    decoded = decode(data)
    content = decoded.error if isinstance(decoded, Undecodable) else decoded
    reply_to = decoded.reply_to
    if reply_to is not None:
        try:
            check_reply_to(reply_to, inbox_prefixes)
        except DecodeError as refused:
            reply_to = None
            content = refused if isinstance(content, Command) else content
    lane = None
    if lane_of is not None:
        try:
            lane = lane_of()
            if isinstance(content, Command):
                lane.check(content.request)
        except DecodeError as refused:
            content = refused
    owns_id = isinstance(decoded, Command) or decoded.owns_id
    request = decoded.request if isinstance(decoded, Command) else None
    state = decoded.tracestate if isinstance(decoded, Command) else None
    trace = trace_context.parse(decoded.traceparent, state)
    ignored = trace_context.ignored(decoded.traceparent, state, trace)
    return Judged(
        content, request, decoded.id, lane, reply_to, decoded.form, owns_id, trace, ignored
    )
