"""A resource that carries hostd's mark and belongs to nothing that the journal knows."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Orphan:
    """`kind` and `name` as in the inventory."""

    kind: str
    name: str
