"""A command message decoded, or the reason why not with the fields that an answer needs.

Nothing here raises: what cannot be read is None, or the default.
"""

import contextlib
import re
from typing import NamedTuple

import msgpack

from schemas import codec, naming
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, Form
from schemas.subjects import REPLY_TO_PATTERN
from schemas.unpack import COMMAND, MESSAGE_MAX_BYTES, UNREADABLE

_ANY = re.compile(r"(?s).*")


class PartialEnvelope(NamedTuple):
    """`id` and `reply_to` are None if missing or unusable; `form` is named if it cannot be read.

    `subjects.check_reply_to` decides whether hostd may publish to `reply_to`, and
    `trace_context.parse` whether `traceparent` is valid.
    """

    id: str | None = None
    reply_to: str | None = None
    form: Form = Form.NAMED
    traceparent: str | None = None


class Undecodable(NamedTuple):
    """A message that is not a valid command: why, and what an answer needs.

    `owns_id`: only the request in it is wrong; its envelope, and so its ID, is valid.
    """

    error: DecodeError
    id: str | None
    reply_to: str | None
    form: Form
    traceparent: str | None
    owns_id: bool


def decode(data: bytes) -> Command | Undecodable:
    """The command, or what can be read of a message that is not a valid one."""
    try:
        return codec.decode_command(data)
    except DecodeError as error:
        found = peek(data)
        owns_id = found.id is not None and codec.is_envelope(data)
        return Undecodable(error, *found, owns_id)


def peek(data: bytes) -> PartialEnvelope:
    """What can be read of an envelope, also of a truncated one.

    The rest is skipped without creating objects; of a message that is too long only the start is
    read.
    """
    data = data[:MESSAGE_MAX_BYTES]
    reader = msgpack.Unpacker(
        raw=False,
        strict_map_key=True,
        unicode_errors="surrogateescape",
        max_buffer_size=MESSAGE_MAX_BYTES,
        max_array_len=0,
        max_map_len=0,
    )
    reader.feed(data)
    ids: list[object] = []
    inboxes: list[object] = []
    parents: list[object] = []
    form = Form.NAMED
    with contextlib.suppress(*UNREADABLE):
        for _ in range(min(reader.read_map_header(), COMMAND.items)):
            match reader.unpack():
                case "id":
                    ids.append(reader.unpack())
                case "reply_to":
                    inboxes.append(reader.unpack())
                case "traceparent":
                    parents.append(reader.unpack())
                case "request":
                    form = _form_at(data[reader.tell() :])
                    reader.skip()
                case _:
                    reader.skip()
    command_id = _only(ids, naming.COMMAND_ID_PATTERN)
    reply_to = _only(inboxes, REPLY_TO_PATTERN)
    return PartialEnvelope(command_id, reply_to, form, _only(parents, _ANY))


def _only(values: list[object], pattern: re.Pattern[str]) -> str | None:
    """The one usable value; None if the key repeats."""
    match values:
        case [str(value)] if pattern.fullmatch(value):
            return value
        case _:
            return None


def _form_at(request: bytes) -> Form:
    """Compact if the fields of the variant are an array (first byte 0x90 to 0x9f, 0xdc, 0xdd)."""
    reader = msgpack.Unpacker(raw=True, max_array_len=0, max_map_len=0)
    reader.feed(request[:128])
    with contextlib.suppress(*UNREADABLE):
        if reader.read_map_header() == 1:
            reader.skip()
            first = request[reader.tell() : reader.tell() + 1]
            if first and (0x90 <= first[0] <= 0x9F or first[0] in (0xDC, 0xDD)):
                return Form.COMPACT
    return Form.NAMED
