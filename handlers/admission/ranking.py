"""Amounts by name, with the largest at hand: who uses a budget, without a look at everyone."""

from bisect import bisect_left, insort
from typing import NamedTuple


class Share(NamedTuple):
    """What one instance, pool or tenant has of a budget."""

    name: str
    amount: int


class Ranking:
    """Kept in order as it changes. An amount of 0 is not in it."""

    def __init__(self) -> None:
        self._amounts: dict[str, int] = {}
        self._order: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._order)

    def get(self, name: str) -> int:
        """0 if the name is not in it."""
        return self._amounts.get(name, 0)

    def add(self, name: str, amount: int) -> None:
        """Change the amount of a name by so much."""
        if not amount:
            return
        before = self._amounts.pop(name, 0)
        if before:
            del self._order[bisect_left(self._order, (before, name))]
        if after := before + amount:
            self._amounts[name] = after
            insort(self._order, (after, name))

    def top(self, count: int) -> list[Share]:
        """The largest, largest first; never more than `count`."""
        largest = self._order[max(0, len(self._order) - count) :]
        return [Share(name, amount) for amount, name in reversed(largest)]
