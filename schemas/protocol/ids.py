"""Names and version of the schemas; what a change of them means is in docs/protocol/README.md."""

from typing import Final

SCHEMA_VERSION: Final = "1.0.0"
"""Semantic version of the protocol's schemas; its first number is the `v` of the envelopes."""


def schema_id(name: str) -> str:
    """The `$id` of one schema, e.g. of `event`; the same for all versions that are compatible."""
    return f"urn:hostd:schema:{SCHEMA_VERSION.partition('.')[0]}:{name}"


def request_name(verb: str) -> str:
    """The schema of what `ask.<verb>` takes."""
    return f"ask.{verb}.request"


def answer_name(verb: str) -> str:
    """The schema of what `ask.<verb>` answers."""
    return f"ask.{verb}.answer"
