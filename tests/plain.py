"""Messages as plain data, to assert on what is really on the wire."""

from typing import Any

import msgpack


def unpacked(data: bytes) -> Any:
    """The maps, lists and scalars of one msgpack message."""
    value: Any = msgpack.unpackb(data)
    return value
