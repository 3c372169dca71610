"""What was looked at to prove whose something is, and what was found. Values only."""

from collections.abc import Iterable
from dataclasses import dataclass

from schemas.records import DiskIdentity


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that was looked at. `name`: what; `found`: in words, with what was expected if it
    is not proven; without a `required` one nothing is adopted."""

    name: str
    proven: bool
    found: str
    required: bool = True

    def as_map(self) -> dict[str, str]:
        """For answers and events."""
        return {"fact": self.name, "found": self.found}


@dataclass(frozen=True, slots=True)
class DiskProof:
    """What was found out about a data disk. `identity` is None if it could not be opened."""

    facts: tuple[Fact, ...]
    identity: DiskIdentity | None


def proven(facts: Iterable[Fact]) -> list[dict[str, str]]:
    return [fact.as_map() for fact in facts if fact.proven]


def not_proven(facts: Iterable[Fact]) -> list[dict[str, str]]:
    return [fact.as_map() for fact in facts if not fact.proven]


def missing(facts: Iterable[Fact]) -> list[Fact]:
    """The required facts that are not proven: the reasons of a refusal."""
    return [fact for fact in facts if fact.required and not fact.proven]
