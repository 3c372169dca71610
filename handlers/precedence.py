"""What a command that arrives does to an earlier one of its instance that has not ended: one table.

docs/pairs.md shows what follows for the sender, pair by pair; its tests run each pair. Commands of
different lanes have no precedence: what they share is decided by the locks and the journal.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from schemas.requests import (
    DestroyInstance,
    Request,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)


class Precedence(StrEnum):
    """What happens to the earlier command."""

    WAITS = "waits"
    """Nothing: the later one waits for its end."""
    SUPERSEDES = "supersedes"
    """It ends at its next safe point, or, if it never ran, without running. Past its point of no
    return it is hurried instead."""
    HURRIES = "hurries"
    """It goes on, but the waits that only give its guest time end."""


_TABLE: Final[Mapping[tuple[type, type], Precedence]] = {
    (StartInstance, StopInstance): Precedence.SUPERSEDES,
    (WakeInstance, StopInstance): Precedence.SUPERSEDES,
    (SleepInstance, StopInstance): Precedence.SUPERSEDES,
    (StartInstance, DestroyInstance): Precedence.SUPERSEDES,
    (WakeInstance, DestroyInstance): Precedence.SUPERSEDES,
    (SleepInstance, DestroyInstance): Precedence.SUPERSEDES,
    (StopInstance, DestroyInstance): Precedence.HURRIES,
    (SleepInstance, SleepInstance): Precedence.HURRIES,  # only with `force`
}


def precedence(earlier: Request, later: Request) -> Precedence:
    """What `later` does to `earlier`, both of one instance."""
    if isinstance(later, SleepInstance) and not later.force:
        return Precedence.WAITS
    return _TABLE.get((type(earlier), type(later)), Precedence.WAITS)
