"""Whom to answer, and how, read of a command that may be bad in every other way.

Nothing here raises: what cannot be read is None, or the default.
"""

import contextlib
import re
from typing import NamedTuple

import msgpack

from schemas import naming
from schemas.envelopes import Form
from schemas.subjects import REPLY_TO_PATTERN
from schemas.unpack import COMMAND, MESSAGE_MAX_BYTES, UNREADABLE


class PartialEnvelope(NamedTuple):
    """`id` and `reply_to` are None if missing or not usable; `form` is the request's if it shows.

    Whether hostd may publish to `reply_to` is `subjects.check_reply_to`'s to say.
    """

    id: str | None = None
    reply_to: str | None = None
    form: Form = Form.NAMED


def peek(data: bytes) -> PartialEnvelope:
    """What can be read of an envelope, also of one cut short.

    The rest is skipped without making objects of it; of a too long message only the start is read.
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
    form = Form.NAMED
    with contextlib.suppress(*UNREADABLE):
        for _ in range(min(reader.read_map_header(), COMMAND.items)):
            match reader.unpack():
                case "id":
                    ids.append(reader.unpack())
                case "reply_to":
                    inboxes.append(reader.unpack())
                case "request":
                    form = _form_at(data[reader.tell() :])
                    reader.skip()
                case _:
                    reader.skip()
    command_id = _only(ids, naming.COMMAND_ID_PATTERN)
    return PartialEnvelope(command_id, _only(inboxes, REPLY_TO_PATTERN), form)


def _only(values: list[object], pattern: re.Pattern[str]) -> str | None:
    """The one usable value; of two that repeat neither is."""
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
