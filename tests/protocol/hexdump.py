"""msgpack bytes as hexadecimal that says what is what, and back."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from schemas.unpack import pack

WIDTH = 48  # bytes on a line


def annotated(value: object, depth: int = 0) -> Iterator[str]:
    """One line per element: its bytes, indented by its depth, and what they are."""
    data = pack(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value)
        inside = sum(len(pack(key)) + len(pack(item)) for key, item in items.items())
        yield _line(data[: len(data) - inside], f"map of {len(items)}", depth)
        for key, item in items.items():
            yield _line(pack(key), f"{key}:", depth + 1)
            yield from annotated(item, depth + 2)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        elements = cast("Sequence[object]", value)
        inside = sum(len(pack(item)) for item in elements)
        yield _line(data[: len(data) - inside], f"array of {len(elements)}", depth)
        for item in elements:
            yield from annotated(item, depth + 1)
    else:
        yield _line(data, json.dumps(value, ensure_ascii=False), depth)


def _line(data: bytes, what: str, depth: int) -> str:
    return f"{'  ' * depth}{data.hex()}  # {what}"


def wrapped(data: bytes) -> Iterator[str]:
    """The bytes alone."""
    for at in range(0, len(data), WIDTH):
        yield data[at : at + WIDTH].hex()


def unhex(text: str) -> bytes:
    """The bytes of a dump of either kind."""
    return bytes.fromhex("".join(line.partition("#")[0] for line in text.splitlines()))
