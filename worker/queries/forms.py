"""The two forms of a query and its answer: msgpack, and JSON for tools such as `nats req`.

The JSON of an answer is made of its msgpack, so both forms say the same.
"""

import enum
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from schemas import unpack
from worker.bus.message import Message


class Wire(enum.Enum):
    """How a map is encoded."""

    MSGPACK = "msgpack"
    JSON = "json"


class Forms(NamedTuple):
    """Of one query: its own form, and that of its answer."""

    asked: Wire
    answered: Wire


MEDIA_TYPES = {
    "application/json": Wire.JSON,
    "application/msgpack": Wire.MSGPACK,
    "application/vnd.msgpack": Wire.MSGPACK,
}
# No map or array of msgpack begins with a smaller byte, and every JSON text begins with one.
MSGPACK_MAP_MIN = 0x80


def forms_of(message: Message) -> Forms:
    """By `Content-Type` and `Accept`, if they name a form; else by the first byte of the body.

    The names of headers are compared without case, of a value only the media type counts. An
    answer has the form of its query, unless `Accept` names another.
    """
    asked = _named(message.headers, "content-type")
    if asked is None:
        looks_json = bool(message.data) and message.data[0] < MSGPACK_MAP_MIN
        asked = Wire.JSON if looks_json else Wire.MSGPACK
    return Forms(asked, _named(message.headers, "accept") or asked)


def read(data: bytes, form: Wire) -> dict[str, object]:
    """The body of a query; an empty one is the empty map.

    Raises:
        DecodeError: as `unpack.unpack_map`, with the same limits for both forms.
    """
    if not data:
        return {}
    if form is Wire.JSON:
        return unpack.read_json(data, unpack.COMMAND)
    return unpack.unpack_map(data)


def write(answer: Mapping[str, object], form: Wire) -> bytes:
    """An answer. In JSON, integers have all their digits, and bytes are base64."""
    packed = unpack.pack(dict(answer))
    if form is Wire.MSGPACK:
        return packed
    return msgspec.json.encode(msgspec.msgpack.decode(packed))


def _named(headers: Mapping[str, str], name: str) -> Wire | None:
    """The first form that the header names."""
    for key, value in headers.items():
        if key.lower() == name:
            for part in value.split(","):
                media_type = part.partition(";")[0].strip().lower()
                if media_type in MEDIA_TYPES:
                    return MEDIA_TYPES[media_type]
    return None
