"""serde's externally tagged enums as unions of msgspec Structs, in both rmp-serde forms.

A unit variant is its name (`"Ping"`); a struct variant is a map of one key, its fields a map
(named form) or an array in declaration order (compact form); Structs inside follow the same rule,
each in its own form. This module knows no particular union.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import msgspec

from schemas.codes import Code
from schemas.decode_error import DecodeError, child, quoted
from schemas.unpack import convert, kind_of

T = TypeVar("T")


class Tag(NamedTuple, Generic[T]):
    """A decoded value and its form: `compact` by its outermost fields, `later` if it has a field of
    a later protocol."""

    value: T
    compact: bool
    later: bool


@dataclass(slots=True)
class _Seen:
    later: bool = False


@dataclass(frozen=True, slots=True)
class _Shape:
    """The fields of one Struct in declaration order, and those that are Structs themselves."""

    kind: type
    names: tuple[str, ...]
    defaults: dict[str, object]
    one: dict[str, "_Shape"] = field(default_factory=dict[str, "_Shape"])
    many: dict[str, "_Shape"] = field(default_factory=dict[str, "_Shape"])


class Tagged(Generic[T]):
    """One enum: its name for messages, its variants.

    `later` are fields that a later protocol appended to the variants, with defaults: they are
    written only if one of them is set, or on request, so that older bytes do not change.
    """

    def __init__(
        self, name: str, variants: Sequence[type[T]], *, later: frozenset[str] = frozenset()
    ) -> None:
        self.name = name
        self.variants = tuple(variants)
        self._later = later
        self._shapes = {kind.__name__: _shape(kind) for kind in variants}
        self._units: dict[str, T] = {
            kind.__name__: kind() for kind in variants if not self._shapes[kind.__name__].names
        }

    def read(self, raw: object, path: str) -> Tag[T]:
        """The variant in plain objects (`schemas/unpack.py`).

        Raises:
            DecodeError: `unsupported` for an unknown variant or field or a surplus element;
                `invalid` for everything else.
        """
        if isinstance(raw, str):
            name, payload = raw, None
        elif isinstance(raw, dict) and len(raw) == 1:  # pyright: ignore[reportUnknownArgumentType]
            ((name, payload),) = typing.cast("dict[str, object]", raw).items()
            path = child(path, name)
        else:
            got = f"map of {len(raw)}" if isinstance(raw, dict) else kind_of(raw)  # pyright: ignore[reportUnknownArgumentType]
            raise DecodeError(path, f"expected the name of a variant or a map of one, got {got}")
        shape = self._shapes.get(name)
        if shape is None:
            raise DecodeError(
                path, f"{self.name} has no variant {quoted(name)}", code=Code.UNSUPPORTED
            )
        if not shape.names:
            if payload is not None:
                raise DecodeError(path, f"{name} has no fields, got {kind_of(payload)}")
            return Tag(self._units[name], compact=False, later=False)
        seen = _Seen()
        fields = self._fields(payload, shape, path, seen, self._later)
        value = typing.cast("T", convert(fields, shape.kind, path))
        return Tag(value, isinstance(payload, list), seen.later)

    def write(self, value: T, *, compact: bool = False, later: bool = False) -> object:
        """Plain objects for the value; with `later` also the fields of a later protocol."""
        name = type(value).__name__
        shape = self._shapes[name]
        if not shape.names:
            return name
        later = later or any(
            getattr(value, each) != shape.defaults[each]
            for each in shape.names
            if each in self._later
        )
        skipped: frozenset[str] = frozenset() if later else self._later
        return {name: _write(value, shape, compact, skipped)}

    def _fields(
        self, raw: object, shape: _Shape, path: str, seen: _Seen, later: frozenset[str]
    ) -> dict[str, object]:
        if isinstance(raw, list):
            items = typing.cast("list[object]", raw)
            if len(items) > len(shape.names):
                raise DecodeError(
                    child(path, len(shape.names)),
                    f"surplus element: {shape.kind.__name__} has {len(shape.names)} fields",
                    code=Code.UNSUPPORTED,
                )
            fields = dict(zip(shape.names, items, strict=False))
        elif isinstance(raw, dict):
            fields = dict(typing.cast("dict[str, object]", raw))
            for name in fields:
                if name not in shape.names:
                    raise DecodeError(
                        child(path, name),
                        f"unknown field of {shape.kind.__name__}",
                        code=Code.UNSUPPORTED,
                    )
        else:
            raise DecodeError(
                path, f"expected the fields of {shape.kind.__name__}, got {kind_of(raw)}"
            )
        seen.later = seen.later or not later.isdisjoint(fields)
        nothing: frozenset[str] = frozenset()
        for name, inner in shape.one.items():
            if name in fields:
                at = child(path, name)
                fields[name] = self._fields(fields[name], inner, at, seen, nothing)
        for name, inner in shape.many.items():
            value = fields.get(name)
            if isinstance(value, list):
                at = child(path, name)
                fields[name] = [
                    self._fields(item, inner, child(at, i), seen, nothing)
                    for i, item in enumerate(typing.cast("list[object]", value))
                ]
        return fields


def _write(value: object, shape: _Shape, compact: bool, skipped: frozenset[str]) -> object:
    fields: dict[str, object] = {}
    for name in shape.names:
        if name in skipped:
            continue
        item: object = getattr(value, name)
        if name in shape.one:
            item = _write(item, shape.one[name], compact, frozenset())
        elif name in shape.many:
            inner = shape.many[name]
            item = [
                _write(each, inner, compact, frozenset())
                for each in typing.cast("tuple[object, ...]", item)
            ]
        fields[name] = item
    return list(fields.values()) if compact else fields


def _shape(kind: type) -> _Shape:
    struct = typing.cast("type[msgspec.Struct]", kind)
    infos = msgspec.structs.fields(struct)
    shape = _Shape(
        kind,
        tuple(info.name for info in infos),
        {info.name: info.default for info in infos if not info.required},
    )
    for info in infos:
        kinds = typing.get_args(info.type) or (info.type,)
        inner = kinds[0]
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            nested = shape.many if typing.get_origin(info.type) is tuple else shape.one
            nested[info.name] = _shape(inner)
    return shape
