"""Untrusted msgpack and JSON to plain objects, under limits; each error has its path.

These are the checks that do not depend on the meaning of the bytes: sizes, duplicate keys, invalid
UTF-8, bin, ext, NaN, depth. Meaning is checked afterwards (`schemas/codec.py`, `files.py`).
Reading never costs more than its input: msgpack creates an object per container, so their number
is counted while it reads, and a bomb of small ones is refused after a few microseconds.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import NoReturn, TypeVar, cast

import msgpack
import msgspec

from schemas.decode_error import DecodeError, child, quoted

MESSAGE_MAX_BYTES = 65_536
MSGSPEC_ERROR = re.compile(r"(.*?)(?: - at `(?:key in )?\$([^`]*)`)?", re.DOTALL)
UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError, msgpack.OutOfData)
INT_MAX = 2**64 - 1  # what msgpack can hold; JSON has no bound of its own
T = TypeVar("T")
Items = dict[str | bytes, object] | list[object]


@dataclass(frozen=True, slots=True)
class Limits:
    """`containers` in total, `items` in each of them, `depth` of nesting."""

    size_bytes: int = MESSAGE_MAX_BYTES
    containers: int = 128
    items: int = 32
    depth: int = 8


COMMAND = Limits()
ANSWER = Limits(containers=4096, items=4096, depth=16)
OWN = Limits(size_bytes=2**24, containers=2**20, items=2**20, depth=64)  # written by hostd
FILE = Limits(size_bytes=262_144, containers=8192, items=4096, depth=16)


class _Repeated:
    """Replaces a map with a duplicate key, until the walk finds its path."""

    def __init__(self, key: str) -> None:
        self.key = key


class _TooMany(Exception):
    pass


class _Fault(Exception):
    """An error on its way up the walk, which collects its path."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.keys: list[str | int] = []


class _Containers:
    """Counts containers while a reader creates them, and finds duplicate keys."""

    def __init__(self, limits: Limits) -> None:
        self._left = limits.containers

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _TooMany

    def of_pairs(self, pairs: list[tuple[object, object]]) -> object:
        self._count()
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        seen: set[object] = set()
        for key, _ in pairs:
            if key in seen:
                return _Repeated(key if isinstance(key, str) else ascii(key))
            seen.add(key)
        return made

    def of_items(self, items: list[object]) -> list[object]:
        self._count()
        return items


def unpack(data: bytes, limits: Limits = COMMAND) -> object:
    """Plain objects from msgpack: dict with str keys, list, str, int, bool, float, None.

    Raises:
        DecodeError: not one msgpack value, beyond the limits, or a kind that no field has.
    """
    if len(data) > limits.size_bytes:
        raise DecodeError("$", f"got {len(data)} bytes, want at most {limits.size_bytes}")
    containers = _Containers(limits)
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=containers.of_pairs,
            list_hook=containers.of_items,
            # Bin, ext and invalid UTF-8 pass here, so that `check` can report the path.
            unicode_errors="surrogateescape",
            max_array_len=limits.items,
            max_map_len=limits.items,
        )
    except _TooMany:
        raise DecodeError("$", f"want at most {limits.containers} maps and arrays") from None
    except msgpack.ExtraData as error:
        raise DecodeError("$", f"got {len(error.extra)} surplus bytes after the value") from None
    except UNREADABLE as error:
        raise DecodeError(
            "$", f"invalid msgpack, or beyond the limits: {_reason(error)}"
        ) from error
    return check(value, limits)


def unpack_map(data: bytes, limits: Limits = COMMAND) -> dict[str, object]:
    """As `unpack`, for a map.

    Raises:
        DecodeError: as `unpack`, or not a map.
    """
    return _as_map(unpack(data, limits))


def read_json(data: bytes, limits: Limits = FILE) -> dict[str, object]:
    """Plain objects from a JSON object; as strict as `unpack`.

    Raises:
        DecodeError: not one JSON object, past the limits, a duplicate key, NaN.
    """
    if len(data) > limits.size_bytes:
        raise DecodeError("$", f"got {len(data)} bytes, want at most {limits.size_bytes}")
    # Counted first: the JSON reader has no limits.
    if data.count(b"{") + data.count(b"[") > limits.containers:
        raise DecodeError("$", f"want at most {limits.containers} objects and arrays")
    containers = _Containers(limits)
    try:
        value = json.loads(data.decode(), object_pairs_hook=containers.of_pairs)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise DecodeError("$", f"invalid JSON: {error.msg}: {where}") from error
    except (ValueError, RecursionError) as error:
        raise DecodeError("$", f"invalid JSON: {_reason(error)}") from error
    return _as_map(check(value, limits))


def convert(raw: object, kind: type[T], path: str = "$") -> T:
    """Typed validation of plain objects by msgspec, strict: no int for bool, no "1" for 1.

    Raises:
        DecodeError: with the path of the field below `path`.
    """
    try:
        return msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as error:
        found = MSGSPEC_ERROR.fullmatch(str(error))
        what, at = found.groups() if found else (str(error), None)
        where = path + (at or "")
        missing = what.removeprefix("Object missing required field `")
        if missing != what:
            raise DecodeError(child(where, missing.rstrip("`")), "is missing") from error
        # The text may quote a value of the input.
        raise DecodeError(where, ascii(what[:200])[1:-1].replace("`", "")) from error


def check(value: object, limits: Limits, path: str = "$") -> object:
    """The value itself, if all of it is of kinds that fields have.

    Raises:
        DecodeError: a duplicate key, bin, ext, NaN, infinity, invalid UTF-8, nested too deeply,
            an integer of more than 64 bits.
    """
    try:
        _walk(value, limits.depth, limits.items)
    except _Fault as fault:
        for key in reversed(fault.keys):
            path = child(path, key)
        raise DecodeError(path, fault.message) from None
    return value


def _walk(value: object, depth: int, items: int) -> None:
    if isinstance(value, str):
        _check_text(value, "the text")
    elif isinstance(value, dict | list):
        if depth == 0:
            raise _Fault("nested too deeply")
        inner = cast("Items", value)
        if len(inner) > items:
            raise _Fault(f"got {len(inner)} items, want at most {items}")
        _walk_into(inner, depth - 1, items)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _Fault("got NaN or infinity, want a finite number")
    elif isinstance(value, int):
        if not -(2**63) <= value <= INT_MAX:
            raise _Fault("got an integer of more than 64 bits")
    elif value is not None:
        _refuse(value)


def _walk_into(value: Items, depth: int, items: int) -> None:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(key, bytes):
            raise _Fault("got a bin key, want str")
        if isinstance(key, str) and not key.isascii():
            _check_text(key, "a key of the map")
        if item is None or (isinstance(item, str) and item.isascii()):
            continue  # most are: a call less for each
        try:
            _walk(item, depth, items)
        except _Fault as fault:
            fault.keys.append(key)
            raise


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Fault(f"{what} is not valid UTF-8") from None


def _refuse(value: object) -> NoReturn:
    if isinstance(value, _Repeated):
        fault = _Fault("duplicate key")
        fault.keys.append(value.key)
        raise fault
    if isinstance(value, bytes):
        raise _Fault("got bin, which no field accepts")
    raise _Fault("got a msgpack extension, which no field accepts")


def _as_map(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise DecodeError("$", f"expected a map, got {kind_of(value)}")
    return cast("dict[str, object]", value)


def pack(value: object) -> bytes:
    """Plain objects to msgpack. Surrogates, as in text from file names, are escaped."""
    return msgpack.packb(value, use_bin_type=True, unicode_errors="backslashreplace")


def kind_of(value: object) -> str:
    """The msgpack type of a plain value, for messages."""
    words: dict[type, str] = {
        dict: "map",
        list: "array",
        str: "str",
        bool: "bool",
        int: "int",
        float: "float",
    }
    return words.get(type(value), "nil")


def _reason(error: Exception) -> str:
    """The decoder's message, which has numbers but no input; or its class if it has none."""
    return (
        quoted(" ".join(str(part) for part in error.args)) if error.args else type(error).__name__
    )
