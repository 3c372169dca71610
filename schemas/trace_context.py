"""The trace context of a command: W3C `traceparent` and `tracestate`, as text and as values.

Source: W3C Trace Context, level 2. What is invalid is no context: a sender's tracing never decides
whether its command is taken.
"""

import re
from typing import Final, NamedTuple, TypedDict

SAMPLED: Final = 0x01
STATE_MAX: Final = 512  # characters of a `tracestate` that are kept; what is longer is left out
MEMBERS_MAX: Final = 32

# Of a version that is not known, the fields of version 00 are read and what follows is ignored.
_PARENT: Final = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
    r"(?P<more>-.*)?"
)
_MEMBER: Final = re.compile(
    r"(?P<key>[a-z0-9][a-z0-9_*/@-]{0,255})="
    r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
_PARENT_MAX: Final = 512


class TraceFields(TypedDict, total=False):
    """As fields of a reply or an event."""

    traceparent: str
    tracestate: str


class TraceContext(NamedTuple):
    """A trace and the span in it that is the parent of what follows.

    `trace_id` and `span_id` are 32 and 16 lower-case hex digits, not all zero. `state` is a valid
    `tracestate`, or empty.
    """

    trace_id: str
    span_id: str
    sampled: bool
    state: str = ""

    @property
    def traceparent(self) -> str:
        """As version 00. Of the flags only `sampled` is kept: others may not be passed on."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"

    @property
    def headers(self) -> dict[str, str]:
        """As headers of a message; `tracestate` only if there is one."""
        found = {"traceparent": self.traceparent}
        return found | {"tracestate": self.state} if self.state else found


def parse(traceparent: str | None, tracestate: str | None = None) -> TraceContext | None:
    """The context in these two texts; None without a valid `traceparent`.

    An invalid or too long `tracestate` is left out, and the `traceparent` stays valid.
    """
    if not traceparent or len(traceparent) > _PARENT_MAX:
        return None
    found = _PARENT.fullmatch(traceparent)
    if found is None or found["version"] == "ff" or (found["version"] == "00" and found["more"]):
        return None
    if not found["trace"].strip("0") or not found["span"].strip("0"):
        return None
    sampled = bool(int(found["flags"], 16) & SAMPLED)
    return TraceContext(found["trace"], found["span"], sampled, _state(tracestate))


def ignored(
    traceparent: str | None, tracestate: str | None, trace: TraceContext | None
) -> tuple[str, ...]:
    """Which of the two texts, read as `trace`, break W3C's rules or exceed 512 characters, by name.

    A `tracestate` counts only beside a valid `traceparent`: without one it means nothing. An empty
    list is a valid one.
    """
    if traceparent is None:
        return ()
    if trace is None:
        return ("traceparent",)
    lost = not trace.state and bool((tracestate or "").strip(" \t,"))
    return ("tracestate",) if lost else ()


def fields_of(trace: TraceContext | None) -> TraceFields:
    """Those that are set."""
    if trace is None:
        return {}
    if not trace.state:
        return {"traceparent": trace.traceparent}
    return {"traceparent": trace.traceparent, "tracestate": trace.state}


def log_fields(trace: TraceContext | None) -> dict[str, str]:
    """The span that a line of the log is about; empty without one."""
    return {} if trace is None else {"trace_id": trace.trace_id, "span_id": trace.span_id}


def _state(text: str | None) -> str:
    """A valid `tracestate`, without empty members; else empty."""
    if not text or len(text) > STATE_MAX:
        return ""
    members = [each for part in text.split(",") if (each := part.strip(" \t"))]
    keys: set[str] = set()
    for each in members:
        found = _MEMBER.fullmatch(each)
        if found is None or found["key"] in keys:
            return ""
        keys.add(found["key"])
    return ",".join(members) if len(members) <= MEMBERS_MAX else ""
