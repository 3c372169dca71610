"""What a row must be: a text for the table and the test of its two numbers."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """`holds` gets hostd's number and the raw one, which is None if there is none."""

    text: str
    holds: Callable[[float, float | None], bool]

    def __and__(self, other: "Budget") -> "Budget":
        return Budget(
            f"{self.text} and {other.text}",
            lambda mine, raw: self.holds(mine, raw) and other.holds(mine, raw),
        )


def at_most(limit: float) -> Budget:
    return Budget(f"at most {limit:g}", lambda mine, _: mine <= limit)


def at_least(limit: float) -> Budget:
    return Budget(f"at least {limit:,g}", lambda mine, _: mine >= limit)


def at_most_more(limit: float, unit: str) -> Budget:
    """Above the raw number."""
    return Budget(f"at most {limit:g} {unit} more", lambda mine, raw: mine - _known(raw) <= limit)


def at_most_times(limit: float) -> Budget:
    """The raw number."""
    return Budget(f"at most {limit:g}x", lambda mine, raw: mine <= limit * _known(raw))


def below_raw() -> Budget:
    return Budget("below raw", lambda mine, raw: mine < _known(raw))


def faster(times: float) -> Budget:
    return Budget(f"{times:g}x faster", lambda mine, raw: _known(raw) >= times * mine)


def within_percent(limit: float) -> Budget:
    """Of the raw number; less is never too little."""
    return Budget(f"within {limit:g} %", lambda mine, raw: mine <= _known(raw) * (1 + limit / 100))


def _known(raw: float | None) -> float:
    if raw is None:
        raise ValueError("this budget compares with a raw number, and the row has none")
    return raw
