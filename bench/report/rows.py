"""Measurements as rows, with all their samples; `results.json` keeps them by group."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.report.budgets import Budget

RESULTS = Path(__file__).parents[1] / "results.json"
SAMPLES_MAX = 200
TUPLES = ("samples", "baseline_samples", "floors")

Samples = Sequence[float]
Stat = Callable[[Samples], float]


@dataclass(frozen=True, slots=True)
class Row:
    """One number and what it was measured against in the same run.

    `value` is hostd's; None in a row that shows only a floor, which is in `baseline`. The floor of
    a row that compares a crowded host with an empty one has both. `ok` is None where there is no
    budget, `at_floor` unless it is missed and there are floors to judge it by: the names in
    `floors`. The samples are those of `value` and of `baseline`.
    """

    name: str
    unit: str
    value: float | None
    baseline: float | None = None
    ratio: float | None = None
    budget: str | None = None
    ok: bool | None = None
    samples: tuple[float, ...] = ()
    baseline_samples: tuple[float, ...] = ()
    at_floor: bool | None = None
    floors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Floors:
    """What grows with the host and is not hostd's, as rows of the same run with both numbers.

    `added` is a part of what the row measures, e.g. the kernel's; `slowed` is something else that
    the same machine does, e.g. the raw loop beside the same guests.
    """

    added: tuple[Row, ...] = ()
    slowed: tuple[Row, ...] = ()

    def without(self, value: float) -> float:
        """What a number would be if none of them had grown."""
        grown = sum(max(0.0, _of(each.value) - _of(each.baseline)) for each in self.added)
        slower = max([1.0, *(_of(each.value) / _of(each.baseline) for each in self.slowed)])
        return (value - grown) / slower


NO_FLOORS = Floors()


@dataclass(frozen=True, slots=True)
class Span:
    """A part of one operation: when it begins after the operation's start, and what it takes."""

    name: str
    begins_ms: float
    takes_ms: float
    indent: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one group measured."""

    rows: list[Row]
    spans: list[Span] = field(default_factory=list[Span])


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def p99(values: Samples) -> float:
    """The 99th percentile; of few values, the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def row(
    name: str,
    unit: str,
    mine: Samples,
    raw: Samples = (),
    *,
    stat: Stat = median,
    budget: Budget | None = None,
    floors: Floors = NO_FLOORS,
) -> Row:
    """A row of the statistic of both; `raw` is empty if there is no raw alternative.

    Where the budget is missed and there are floors, the row is at its floor if the budget holds
    without what these grew by.
    """
    value, baseline = stat(mine), stat(raw) if raw else None
    ok = None if budget is None else budget.holds(value, baseline)
    at_floor = None
    if budget is not None and not ok and floors != NO_FLOORS:
        at_floor = budget.holds(floors.without(value), baseline)
    return Row(
        name,
        unit,
        _round(value),
        None if baseline is None else _round(baseline),
        _round(value / baseline) if baseline else None,
        None if budget is None else budget.text,
        ok,
        kept(mine),
        kept(raw),
        at_floor,
        tuple(each.name for each in (*floors.added, *floors.slowed)),
    )


def floor(name: str, unit: str, samples: Samples, many: Samples = ()) -> Row:
    """What kernel, disk, jailer, VMM or broker take alone: nothing that is done can be faster.

    `many` is the same on a crowded host.
    """
    baseline, value = median(samples), median(many) if many else None
    return Row(
        f"floor: {name}",
        unit,
        None if value is None else _round(value),
        _round(baseline),
        None if value is None else _round(value / baseline),
        samples=kept(many),
        baseline_samples=kept(samples),
    )


def kept(samples: Samples) -> tuple[float, ...]:
    """At most SAMPLES_MAX of them, evenly chosen in their order, in four digits."""
    step = max(1, math.ceil(len(samples) / SAMPLES_MAX))
    return tuple(_round(each) for each in samples[::step])


def _of(number: float | None) -> float:
    if number is None:
        raise ValueError("a floor is compared on both hosts, and this one was measured on one")
    return number


def _round(value: float) -> float:
    return float(f"{value:.4g}")


# -- results.json ----------------------------------------------------------------------------------


def measured_of(data: Mapping[str, Any]) -> Measured:
    """The inverse of `asdict`."""
    rows = [
        Row(**each | {name: tuple(each.get(name, ())) for name in TUPLES}) for each in data["rows"]
    ]
    return Measured(rows, [Span(**each) for each in data.get("spans", ())])


def read_results() -> dict[str, Any]:
    """By group; empty without a file, or if an older bench wrote it."""
    try:
        found: Any = json.loads(RESULTS.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    try:
        groups: dict[str, Any] = found["groups"]
    except (KeyError, TypeError):
        return {}
    return groups


def write_results(machine: Sequence[str], measured: Mapping[str, Measured]) -> dict[str, Measured]:
    """Replace the groups measured now, keep the others; returns all, in the order of the file.

    One row a line: the file is for programs, and for a diff of what changed.
    """
    groups = read_results()
    for name, each in measured.items():
        groups[name] = {"machine": list(machine), **asdict(each)}
    lines = [f' "{name}": {_group(groups[name])}' for name in sorted(groups)]
    text = '{"groups": {\n' + ",\n".join(lines) + "\n}}\n"
    RESULTS.write_text(text, encoding="utf-8")
    return {name: measured_of(groups[name]) for name in groups}


def _group(group: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for key in ("machine", "rows", "spans"):
        items = ",\n   ".join(_compact(each) for each in group.get(key, ()))
        parts.append(f'\n  "{key}": [\n   {items}\n  ]' if items else f'\n  "{key}": []')
    return "{" + ",".join(parts) + "\n }"


def _compact(item: str | dict[str, Any]) -> str:
    """Without what says nothing; a row always has its `value`."""
    if isinstance(item, dict):
        item = {k: v for k, v in item.items() if v not in (None, (), []) or k == "value"}
    return json.dumps(item, separators=(",", ":"))
