"""What a mechanism is, and what the journal remembers of one step with it. Types only.

A mechanism is one kind of resource on this host. It has three verbs: is it there, make it, remove
it. A key names one resource, also after a restart, when nothing but the step's row is left. What
else has to be known about the kind (must its rows survive a reboot, may the reconciler remove one)
the mechanism declares itself: there is no list of mechanism names anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar, Protocol, TypeVar

SpecT = TypeVar("SpecT", bound="Keyed", contravariant=True)
ValueT = TypeVar("ValueT", covariant=True)


class Durability(Enum):
    """How the row that announces a resource must be committed, before the resource is made."""

    VOLATILE = auto()
    """The resource is gone after a reboot, so its row may be lost with it: no sync."""

    DURABLE = auto()
    """The resource survives a reboot: the row is synced to disk first."""

    IMPLIED = auto()
    """The resource is made by, or after, a later synced commit of the same journal. Commits keep
    the order of submission, so that commit takes the row to disk: the row waits for nothing."""


class Keyed(Protocol):
    @property
    def key(self) -> str:
        """Names one resource of its mechanism; enough to remove it after a restart."""
        ...


class Removable(Protocol):
    """What undo and the reconciler need of a mechanism."""

    name: ClassVar[str]
    """A singular noun. Public: step name in replies, metric label, failpoint, `left_behind`."""

    durability: ClassVar[Durability]

    swept: ClassVar[bool]
    """Whether the reconciler removes what a finished command left behind. False for a state of
    one instance, which that instance's next command or the next recovery ends."""

    async def exists(self, key: str) -> bool:
        """Whether the resource, or any part of it, is on this host. No effect."""
        ...

    async def remove(self, key: str) -> None:
        """Remove it; success if it is absent already."""
        ...


class Mechanism(Removable, Protocol[SpecT, ValueT]):
    """One kind of resource on this host, e.g. TAPs. `spec.key` names one of them in the journal."""

    async def ensure(self, spec: SpecT) -> ValueT:
        """Make it match the spec, or change nothing if it does; a partial effect is cleaned up."""
        ...


@dataclass(frozen=True, slots=True)
class StepIntent:
    """What a step is about to make; `existed` before this run."""

    mechanism: str
    key: str
    existed: bool
    durability: Durability


@dataclass(frozen=True, slots=True)
class StepRow:
    """A row of the step log: `existed` before the command's first run of it."""

    mechanism: str
    key: str
    existed: bool


class StepLog(Protocol):
    """The journal's side of the steps of one command."""

    async def begin(self, command_id: str, *intents: StepIntent) -> Sequence[StepRow]:
        """Commit the intents in one transaction; the row of an earlier run is kept and returned."""
        ...

    async def forget(self, command_id: str, mechanism: str, key: str) -> None:
        """Delete the row: the resource is gone, or was not this command's."""
        ...

    def rows(self, command_id: str) -> Sequence[StepRow]:
        """In the order of `begin`."""
        ...

    async def mark(self, command_id: str, name: str) -> None:
        """Commit a mark with `synchronous=FULL`."""
        ...

    def marked(self, command_id: str, name: str) -> bool:
        """Whether any run of the command committed the mark."""
        ...
