"""A route of the control interface, what it gets and what it answers, also on failure."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, TypeVar

import msgspec

from handlers.errors import Failure, Invalid
from schemas import unpack
from schemas.codes import Code
from schemas.decode_error import DecodeError

MAX_BODY_BYTES: Final = 65_536
_BODY: Final = unpack.Limits(size_bytes=MAX_BODY_BYTES, containers=1000, items=1000, depth=8)

Body = Mapping[str, object]
Answer = Mapping[str, object]
Handler = Callable[[Body], Awaitable[Answer] | AsyncGenerator[Answer]]
T = TypeVar("T", bound=msgspec.Struct)

STATUS: Final[Mapping[Code, HTTPStatus]] = {
    Code.OK: HTTPStatus.OK,
    Code.INVALID: HTTPStatus.BAD_REQUEST,
    Code.UNSUPPORTED: HTTPStatus.NOT_IMPLEMENTED,
    Code.CONFLICT: HTTPStatus.CONFLICT,
    Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.EXHAUSTED: HTTPStatus.INSUFFICIENT_STORAGE,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.EXPIRED: HTTPStatus.GATEWAY_TIMEOUT,
    Code.SUPERSEDED: HTTPStatus.CONFLICT,
    Code.DRAINING: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.HOST_FAULT: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}


@dataclass(frozen=True, slots=True)
class Route:
    """What one request does.

    Attributes:
        handler: a coroutine function that returns the answer, or, of a route that takes long, an
            async generator of lines: `{"progress": ...}` as often as it likes, at the end
            `{"result": ...}`. Gets the body, `{}` if there is none (`read_body` checks it); may
            raise a `Failure` or an `OSError`.
        writes: it changes the journal, and is refused while that cannot commit.
    """

    method: str
    path: str
    handler: Handler
    writes: bool = False


class _Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class MethodNotAllowed(Invalid):
    """The path exists, with another method."""


def decode_body(data: bytes) -> Body:
    """The body as plain values.

    Raises:
        Invalid: it is no JSON object, or beyond the limits.
    """
    if not data:
        return {}
    if len(data) > MAX_BODY_BYTES:
        raise Invalid(f"the body has more than {MAX_BODY_BYTES} bytes")
    try:
        return unpack.read_json(data, _BODY)
    except DecodeError as error:
        raise Invalid(f"the body is no JSON object: {error}", path=error.path) from error


def read_body(body: Body, kind: type[T]) -> T:
    """The body as a struct, strictly; for handlers.

    Raises:
        Invalid: names the field.
    """
    try:
        return unpack.convert(dict(body), kind)
    except DecodeError as error:
        raise Invalid(str(error), path=error.path) from error


def read_nothing(body: Body) -> None:
    """For handlers whose route takes no field. Raises Invalid: names the first one."""
    read_body(body, _Nothing)


def error_of(failure: Failure | None) -> Answer:
    """The answer to a failure; None is a bug, whose facts are in the log only."""
    if failure is None:
        text = "internal error; see the log of this host"
        return {"error": {"code": Code.INTERNAL.value, "message": text, "act": "operator"}}
    facts: dict[str, object] = {
        "code": failure.code.value,
        "message": failure.message,
        "act": failure.act,
    }
    if failure.path is not None:
        facts["path"] = failure.path
    if failure.detail:
        facts["detail"] = failure.detail
    return {"error": facts}


def status_of(failure: Failure | None) -> HTTPStatus:
    if isinstance(failure, MethodNotAllowed):
        return HTTPStatus.METHOD_NOT_ALLOWED
    return STATUS[Code.INTERNAL if failure is None else failure.code]


def encode(value: Answer) -> bytes:
    """One line of JSON.

    Raises:
        TypeError: a value that has no JSON: a bug of the handler.
    """
    return msgspec.json.encode(value) + b"\n"
