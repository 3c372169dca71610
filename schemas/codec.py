"""Command, reply and event envelopes to bytes and back.

Decoding raises `DecodeError` and nothing else, whatever the bytes. It checks types, ranges and the
rules for IDs. Checks that need settings or the host are elsewhere: `reply_to` and the lane in
`schemas/subjects.py`, a `TenantNet` in `schemas/tenant_net.py`.
"""

import hashlib
from typing import Annotated, Any, Literal

import msgspec

from schemas import naming
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, Event, Form, Reply, StepTaken
from schemas.requests import PROTOCOL_MAX, PROTOCOL_MIN, Error, Request
from schemas.serde import LINE_MAX, REQUEST, RESPONSE, read_request
from schemas.unpack import ANSWER, MESSAGE_MAX_BYTES, OWN, convert, pack, unpack, unpack_map

# The rest up to the limit of a message is for the headers, which a stream counts.
SENT_MAX_BYTES = MESSAGE_MAX_BYTES - 4096

DIGEST_DIGITS = 32

# Year 9999. Also the largest time that every consumer of it can hold: SQLite's integers are signed.
TIME_MAX_MS = 253_402_300_799_999
TimeMs = Annotated[int, msgspec.Meta(ge=0, le=TIME_MAX_MS)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Line = Annotated[str, msgspec.Meta(max_length=LINE_MAX)]


class CommandKeys(msgspec.Struct, frozen=True):
    """A command envelope, its request not interpreted. Unknown keys are ignored."""

    v: Literal[1]
    id: str
    request: Any
    issued_at_ms: TimeMs | None = None
    deadline_ms: TimeMs | None = None
    reply_to: Line | None = None
    issuer: Line | None = None
    traceparent: str | None = None  # any text: an invalid one is ignored, not refused
    tracestate: str | None = None


class ReplyKeys(msgspec.Struct, frozen=True, kw_only=True):
    """A reply envelope, its response not interpreted."""

    v: Literal[1]
    id: str
    host_id: str
    response: Any
    code: Code
    retryable: bool
    changed: bool
    status: str | None = None
    attempts: Count
    replayed: bool
    received_at_ms: TimeMs
    finished_at_ms: TimeMs
    steps: tuple[StepTaken, ...] = ()
    left_behind: tuple[str, ...] = ()
    supported: tuple[str, ...] = ()
    detail: dict[str, Any] = {}
    request_digest: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


class _Versioned(msgspec.Struct, frozen=True):
    v: Literal[1]


COMMAND_KEYS = frozenset(CommandKeys.__struct_fields__)
OPTIONAL_KEYS = CommandKeys.__struct_fields__[3:]
OPTIONAL_REPLY_KEYS = ("supported", "request_digest", "traceparent", "tracestate")


# -- requests ----------------------------------------------------------------------------------


def encode_request(request: Request, form: Form = Form.NAMED) -> bytes:
    """The request alone. The named form is canonical: equal requests, equal bytes."""
    return pack(REQUEST.write(request, compact=form is Form.COMPACT))


def request_digest(request: Request) -> str:
    """Which request it is, whatever form it was sent in: 32 hex digits of SHA-256."""
    return digest_of(encode_request(request))


def digest_of(request: bytes) -> str:
    """As `request_digest`, of what `encode_request` wrote in the named form."""
    return hashlib.sha256(request).hexdigest()[:DIGEST_DIGITS]


def decode_request(data: bytes) -> Request:
    """The request alone, in either form.

    Raises:
        DecodeError: see `decode_command`.
    """
    return read_request(unpack(data)).value


# -- commands ----------------------------------------------------------------------------------


def read_envelope(raw: dict[str, object]) -> CommandKeys:
    """The keys of a command envelope, its request not interpreted.

    Raises:
        DecodeError: `invalid`.
    """
    keys = convert(raw, CommandKeys)
    if not naming.COMMAND_ID_PATTERN.fullmatch(keys.id):
        raise DecodeError("$.id", "want 1 to 64 characters A-Z, a-z, 0-9, '_' or '-'")
    return keys


def read_command(raw: dict[str, object]) -> Command:
    """A command envelope in plain objects.

    Raises:
        DecodeError: see `decode_command`.
    """
    keys = read_envelope(raw)
    request, compact, later = read_request(keys.request, "$.request")
    return Command(
        id=keys.id,
        request=request,
        form=Form.COMPACT if compact else Form.NAMED,
        issued_at_ms=keys.issued_at_ms,
        deadline_ms=keys.deadline_ms,
        reply_to=keys.reply_to,
        issuer=keys.issuer,
        traceparent=keys.traceparent,
        tracestate=keys.tracestate,
        unknown_keys=tuple(key for key in raw if key not in COMMAND_KEYS),
        protocol=PROTOCOL_MAX if later else PROTOCOL_MIN,
    )


def is_envelope(data: bytes) -> bool:
    """Whether all but the meaning of the request is valid."""
    try:
        read_envelope(unpack_map(data))
    except DecodeError:
        return False
    return True


def decode_command(data: bytes) -> Command:
    """A command envelope, the request in either form.

    Unknown keys of the envelope are listed in `unknown_keys`, to be counted.

    Raises:
        DecodeError: `unsupported` for an unknown variant, field or surplus element of the request
            and for `volumes`, `invalid` for everything else.
    """
    return read_command(unpack_map(data))


def encode_command(command: Command) -> bytes:
    """The inverse of `decode_command`, `unknown_keys` aside."""
    return pack(write_command(command, compact=command.form is Form.COMPACT))


def write_command(command: Command, *, compact: bool = False) -> dict[str, object]:
    """The envelope as plain objects in wire order; optional keys that are not set are left out."""
    later = command.protocol > PROTOCOL_MIN
    raw: dict[str, object] = {
        "v": 1,
        "id": command.id,
        "request": REQUEST.write(command.request, compact=compact, later=later),
    }
    for name in OPTIONAL_KEYS:
        value = getattr(command, name)
        if value is not None:
            raw[name] = value
    return raw


# -- replies -----------------------------------------------------------------------------------


def read_reply(raw: dict[str, object]) -> Reply:
    """A reply envelope in plain objects.

    Raises:
        DecodeError: with the path of the error.
    """
    keys = convert(raw, ReplyKeys)
    response = RESPONSE.read(keys.response, "$.response").value
    fields: dict[str, Any] = {name: getattr(keys, name) for name in ReplyKeys.__struct_fields__}
    fields["response"] = response
    return Reply(**fields)


def decode_reply(data: bytes) -> Reply:
    """A reply envelope, the response in either form.

    Raises:
        DecodeError: with the path of the error.
    """
    return read_reply(unpack_map(data, ANSWER))


def encode_reply(reply: Reply, form: Form = Form.NAMED) -> bytes:
    """The envelope, its response in the form of the request.

    One that is too long for a message is shortened, and `detail` says so: there is always a reply.
    """
    data = pack(write_reply(reply, compact=form is Form.COMPACT))
    if len(data) <= SENT_MAX_BYTES:
        return data
    response = reply.response
    short = msgspec.structs.replace(
        reply,
        response=Error(response.message[:2000]) if isinstance(response, Error) else response,
        steps=reply.steps[-64:],
        left_behind=tuple(each[:256] for each in reply.left_behind[:32]),
        detail={"shortened_from_bytes": len(data)},
    )
    return pack(write_reply(short, compact=form is Form.COMPACT))


def write_reply(reply: Reply, *, compact: bool = False) -> dict[str, object]:
    """The envelope as plain objects in wire order; `OPTIONAL_REPLY_KEYS` only if set."""
    raw: dict[str, object] = {name: getattr(reply, name) for name in Reply.__struct_fields__}
    raw["response"] = RESPONSE.write(reply.response, compact=compact)
    raw["steps"] = [
        {"name": step.name, "took_us": step.took_us, "outcome": step.outcome}
        for step in reply.steps
    ]
    for name in OPTIONAL_REPLY_KEYS:
        if raw[name] in (None, ()):
            del raw[name]
    return raw


def mark_replayed(data: bytes) -> bytes:
    """A stored reply as it is sent again: byte for byte the same except `replayed: true`."""
    raw = unpack_map(data, OWN)
    raw["replayed"] = True
    return pack(raw)


# -- events ------------------------------------------------------------------------------------


def read_event(raw: dict[str, object]) -> Event:
    """An event envelope in plain objects.

    Raises:
        DecodeError: with the path of the error.
    """
    convert(raw, _Versioned)
    return convert(raw, Event)


def decode_event(data: bytes) -> Event:
    """An event envelope.

    Raises:
        DecodeError: with the path of the error.
    """
    return read_event(unpack_map(data, ANSWER))


def encode_event(event: Event) -> bytes:
    """The envelope; keys that are not set are left out, `from_` is `from`. Shortened as replies."""
    data = pack(write_event(event))
    if len(data) <= SENT_MAX_BYTES:
        return data
    reason = None if event.reason is None else event.reason[:2000]
    detail = {"shortened_from_bytes": len(data)}
    return pack(write_event(msgspec.structs.replace(event, reason=reason, detail=detail)))


def write_event(event: Event) -> dict[str, object]:
    """The envelope as plain objects in wire order."""
    named = zip(Event.__struct_encode_fields__, Event.__struct_fields__, strict=True)
    raw = {wire: getattr(event, name) for wire, name in named}
    return {wire: value for wire, value in raw.items() if value is not None}
