"""What a mechanism is, and what the journal remembers of one step with it. Types only.

Three verbs: is it there, make it so, make it absent. A key names one resource, also after a
restart, when nothing but the step's row is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

SpecT = TypeVar("SpecT", bound="Keyed", contravariant=True)
ValueT = TypeVar("ValueT", covariant=True)


class Keyed(Protocol):
    @property
    def key(self) -> str:
        """Names one resource of its mechanism; enough to remove it after a restart."""
        ...


class Removable(Protocol):
    """What undo needs of a mechanism."""

    name: ClassVar[str]

    async def exists(self, key: str) -> bool:
        """Whether the resource, or any part of it, is on this host. No effect."""
        ...

    async def remove(self, key: str) -> None:
        """Make it absent; absent already is success."""
        ...


class Mechanism(Removable, Protocol[SpecT, ValueT]):
    """One kind of resource on this host, e.g. TAPs. `spec.key` names one of them in the journal."""

    async def ensure(self, spec: SpecT) -> ValueT:
        """Make it so, all or nothing; found as asked changes nothing. Half-work is cleaned here."""
        ...


@dataclass(frozen=True, slots=True)
class StepRow:
    """A row of the step log: `existed` before the command's first run of it."""

    mechanism: str
    key: str
    existed: bool


class StepLog(Protocol):
    """The journal's side of the steps of one command."""

    async def begin(self, command_id: str, mechanism: str, key: str, *, existed: bool) -> StepRow:
        """Commit the intent; an earlier run's row is returned as it was."""
        ...

    async def begin_all(self, command_id: str, rows: Sequence[StepRow]) -> None:
        """Commit several intents at once; rows that are there stay as they were."""
        ...

    async def forget(self, command_id: str, mechanism: str, key: str) -> None: ...

    def rows(self, command_id: str) -> Sequence[StepRow]:
        """In the order of `begin`."""
        ...

    async def mark(self, command_id: str, name: str) -> None:
        """Commit a mark with `synchronous=FULL`."""
        ...

    def marked(self, command_id: str, name: str) -> bool: ...
