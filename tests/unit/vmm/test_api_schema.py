"""Every field of every request: what a version does not accept is not sent, all else always is."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from handlers.host.vmm import api_schema
from handlers.host.vmm.api_schema import (
    Body,
    Since,
    for_version,
    is_versioned,
    versioned_fields,
)
from handlers.host.vmm.versions import NEWEST, OLDEST, Version

BODIES = sorted(Body.__subclasses__(), key=lambda kind: kind.__name__)
VERSIONED = [
    (kind, name, since) for kind in BODIES for name, since in versioned_fields(kind).items()
]
UNVERSIONED = [
    (kind, name)
    for kind in BODIES
    for name in kind.__struct_fields__
    if name not in versioned_fields(kind)
]
OLD: Version = (*OLDEST, 0)
NEW: Version = (*NEWEST, 0)


BOOLEANS = (True, False)


def other_than_default(hint: Any, default: object) -> Any:
    """A value of that type that is not the default, so that it is sent."""
    if get_origin(hint) is Annotated:
        return other_than_default(get_args(hint)[0], default)
    if get_origin(hint) in (types.UnionType, Union):
        hint = next(each for each in get_args(hint) if each is not type(None))
    if isinstance(hint, type) and issubclass(hint, Body):
        return full(hint)
    values = get_args(hint) if get_origin(hint) is Literal else BOOLEANS if hint is bool else None
    if values is None:
        values = (hint(1), hint(2))
    return next(value for value in values if value != default)


def full(kind: type[Body]) -> Body:
    """A body with every field set."""
    hints = get_type_hints(kind, include_extras=True)
    fields = msgspec.structs.fields(kind)
    return kind(**{f.name: other_than_default(hints[f.name], f.default) for f in fields})


def sent(body: Body, version: Version) -> dict[str, Any] | None:
    accepted = for_version(body, version)
    return None if accepted is None else msgspec.to_builtins(accepted)


def just_before(since: Since) -> Version:
    return (since.major, since.minor - 1, 99)


def all_bodies(kind: type[Body]) -> Iterator[type[Body]]:
    for below in kind.__subclasses__():
        yield below
        yield from all_bodies(below)


def test_every_body_is_covered() -> None:
    assert list(all_bodies(Body)) == Body.__subclasses__()
    assert {kind.__module__ for kind in BODIES} >= {api_schema.__name__}
    assert {name for _, name, _ in VERSIONED} >= {"serial_out_path", "clock_realtime"}


@pytest.mark.parametrize(("kind", "name", "since"), VERSIONED)
def test_a_versioned_field_is_sent_from_its_version_on(
    kind: type[Body], name: str, since: Since
) -> None:
    body = full(kind)

    for version in ((since.major, since.minor, 0), (since.major, since.minor, 7), NEW):
        accepted = sent(body, version)
        assert accepted is not None
        assert accepted[name] == msgspec.to_builtins(getattr(body, name))


@pytest.mark.parametrize(("kind", "name", "since"), VERSIONED)
def test_a_versioned_field_is_not_sent_before_its_version(
    kind: type[Body], name: str, since: Since
) -> None:
    for version in (just_before(since), OLD):
        accepted = sent(full(kind), version)
        assert accepted is None or name not in accepted


@pytest.mark.parametrize(("kind", "name"), UNVERSIONED)
def test_a_field_without_a_version_is_never_dropped(kind: type[Body], name: str) -> None:
    for version in (OLD, NEW):
        accepted = sent(full(kind), version)
        assert accepted is not None
        assert name in accepted


@pytest.mark.parametrize(("kind", "name", "since"), VERSIONED)
def test_the_version_of_a_field_is_newer_than_the_oldest_and_supported(
    kind: type[Body], name: str, since: Since
) -> None:
    assert OLDEST < (since.major, since.minor) <= NEWEST


@pytest.mark.parametrize("kind", BODIES)
def test_a_required_field_is_versioned_only_if_the_whole_endpoint_is(kind: type[Body]) -> None:
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}

    assert required & versioned_fields(kind).keys() in (set(), required)


class _Nested(Body, frozen=True):
    old: int
    new: Annotated[int | None, Since(1, 14)] = None


class _Outer(Body, frozen=True):
    nested: _Nested
    optional: _Nested | None = None


def test_a_nested_body_is_filtered_too() -> None:
    body = _Outer(_Nested(1, 2), _Nested(3, 4))

    assert is_versioned(body)
    assert sent(body, (1, 13, 0)) == {"nested": {"old": 1}, "optional": {"old": 3}}
    assert for_version(body, (1, 14, 0)) is body
