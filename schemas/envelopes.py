"""Command, reply and event envelopes. Always maps on the wire, whatever form the request has."""

from enum import StrEnum
from typing import Any

import msgspec

from schemas.codes import Code
from schemas.requests import PROTOCOL_MIN, Request, Response

__all__ = [
    "Command",
    "Event",
    "EventKind",
    "Form",
    "Reply",
    "StepTaken",
]


class Form(StrEnum):
    """Which rmp-serde layout the serde types have: `named` maps or `compact` arrays."""

    NAMED = "named"
    COMPACT = "compact"


class Command(msgspec.Struct, frozen=True):
    """One decoded command envelope; times are absolute Unix milliseconds.

    `traceparent` and `tracestate` are as sent; `schemas/trace_context.py` says what is valid.
    `form` and `protocol` are the encoding of the request, not part of its meaning.
    """

    id: str
    request: Request
    form: Form = Form.NAMED
    issued_at_ms: int | None = None
    deadline_ms: int | None = None
    reply_to: str | None = None
    issuer: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    unknown_keys: tuple[str, ...] = ()
    protocol: int = PROTOCOL_MIN


class StepTaken(msgspec.Struct, frozen=True):
    """One step of a command as its reply shows it. `outcome`: done, found, failed, undone."""

    name: str
    took_us: int
    outcome: str


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A reply envelope. `traceparent` names the span of the command, if it is part of a trace.

    `request_digest` (`codec.request_digest`) says which request it answers; None if that could not
    be read, and from an older hostd.
    """

    v: int = 1
    id: str
    host_id: str
    response: Response
    code: Code
    retryable: bool = False
    changed: bool = False
    status: str | None = None
    attempts: int = 0
    replayed: bool = False
    received_at_ms: int
    finished_at_ms: int
    steps: tuple[StepTaken, ...] = ()
    left_behind: tuple[str, ...] = ()
    supported: tuple[str, ...] = ()
    detail: dict[str, Any] = {}
    request_digest: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


class EventKind(StrEnum):
    """What an event reports; the last token of its subject."""

    STATUS = "status"
    COMMAND = "command"
    VMM_EXITED = "vmm_exited"
    VMM_HUNG = "vmm_hung"
    NETWORK = "network"
    DRIFT = "drift"
    REMOVED = "removed"
    QUARANTINED = "quarantined"
    SNAPSHOT = "snapshot"
    RECOVERED = "recovered"
    DISK = "disk"
    RELEASED = "released"
    DRAIN = "drain"
    VMM_VERSIONS = "vmm_versions"
    ORPHANS = "orphans"
    HOST = "host"
    USAGE = "usage"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event envelope; `id` is `<host_id>:<journal_id>:<seq>`. The journal gives `seq`.

    `traceparent` names the span of the command that it is an effect of.
    """

    v: int = 1
    id: str
    host_id: str
    boot_id: str
    journal_id: str
    seq: int
    at_ms: int
    kind: EventKind
    tenant_id: str | None = None
    pool_id: str | None = None
    instance_id: str | None = None
    from_: str | None = msgspec.field(default=None, name="from")
    to: str | None = None
    command_id: str | None = None
    reason: str | None = None
    detail: dict[str, Any] = {}
    traceparent: str | None = None
    tracestate: str | None = None
