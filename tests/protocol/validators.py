"""Validators of the protocol's schemas, as a reader in another language has them."""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jsonschema
import msgspec
from jsonschema.protocols import Validator

from schemas.protocol.json_schema import Schema, closed, documents
from tests.plain import unpacked
from tests.protocol.sent import Sent


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


def value_of(sent: Sent) -> Any:
    """The message as plain objects."""
    if sent.headers:
        return sent.headers
    if sent.payload[:1] in (b"{", b"["):
        return msgspec.json.decode(sent.payload)
    return unpacked(sent.payload)


def faults_in(messages: Iterable[Sent]) -> list[str]:
    """What is wrong with the messages of a worker: each fault once."""
    found = (fault for sent in messages for fault in faults(sent.schema, value_of(sent)))
    return list(dict.fromkeys(found))


def _deepest(error: jsonschema.ValidationError) -> str:
    """Of a union that nothing fits: the errors of each of its types."""
    inner = "; ".join(_deepest(each) for each in error.context or ())
    return f"{error.json_path}: {error.message[:300]}" + (f" ({inner})" if inner else "")
