"""What a reply of the JetStream API says, and numbers in its headers.

The bytes come from whoever may publish on the reply's subject: what is not a reply is a `BusError`.
"""

from typing import Any, Final, cast

import msgspec

from worker.bus.protocol import BusError

DIGITS_MAX: Final = 20  # of a number of 64 bits


def read_reply(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object; its `error`, if it has one, is an object too.

    Raises:
        BusError: not a reply of the API; `what` names it in the message.
    """
    try:
        found: object = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise BusError(
            f"{what}: expected a JSON object, found {len(data)} bytes of none"
        ) from error
    if not isinstance(found, dict):
        raise BusError(f"{what}: expected a JSON object, found {type(found).__name__}")
    reply = cast("dict[str, Any]", found)
    if not isinstance(reply.get("error", {}), dict):
        raise BusError(f"{what}: expected an object as its error")
    return reply


def member(reply: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    """An object within the reply. Raises BusError if there is none."""
    found: object = reply.get(name)
    if not isinstance(found, dict):
        raise BusError(f"{what}: expected an object {name!r} in the reply")
    return cast("dict[str, Any]", found)


def sequence_of(reply: dict[str, Any], name: str, what: str) -> int:
    """A sequence number within the reply. Raises BusError if it is none of 64 bits."""
    found: object = reply.get(name)
    if not isinstance(found, int) or not 0 <= found < 2**64:
        raise BusError(f"{what}: expected a sequence number as {name!r} in the reply")
    return found


def limit_of(reply: dict[str, Any], name: str, what: str) -> int:
    """A bound within the reply, -1: none. Raises BusError if it is none of 64 bits."""
    found: object = reply.get(name)
    return -1 if found == -1 else sequence_of(reply, name, what)


def header_number(text: str) -> int | None:
    """The number in a header; None if it is not one."""
    if not (text.isascii() and text.isdigit()) or len(text) > DIGITS_MAX:
        return None
    return int(text)
