"""Validators of the protocol's schemas, as a reader in another language has them."""

import functools
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
from jsonschema.protocols import Validator

from schemas.protocol.json_schema import Schema, closed, documents


def _matches(
    validator: Validator, pattern: str, value: object, schema: Schema
) -> Iterator[jsonschema.ValidationError]:
    """`pattern` by ECMA-262, where `$` is the end and not also a line feed before it."""
    if isinstance(value, str) and not re.search(re.sub(r"\$(?=$|\))", r"\\Z", pattern), value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _is_integer(checker: object, value: object) -> bool:
    """1.0 is none, as in msgpack; JSON Schema cannot say so."""
    return isinstance(value, int) and not isinstance(value, bool)


_Strict: Any = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    {"pattern": _matches},
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


@functools.cache
def _validator(name: str, *, strict: bool) -> Any:
    made = documents()[name]
    return _Strict(closed(made) if strict else made)


def accepts(name: str, value: object) -> bool:
    """Whether a message is valid for a reader of the schema."""
    return bool(_validator(name, strict=False).is_valid(value))


def faults(name: str, value: object) -> list[str]:
    """What is wrong with a message that hostd sends; empty if nothing is.

    A field that the schema does not name is wrong, too: no reader knows what it means.
    """
    found = _validator(name, strict=True).iter_errors(value)
    return [f"{name} {_deepest(each)}" for each in found]


def _deepest(error: jsonschema.ValidationError) -> str:
    """Of a union that nothing fits: the errors of each of its types."""
    inner = "; ".join(_deepest(each) for each in error.context or ())
    return f"{error.json_path}: {error.message[:300]}" + (f" ({inner})" if inner else "")
