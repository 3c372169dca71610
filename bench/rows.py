"""Measurements as rows; rows as a table, `results.json` and `docs/benchmarks.md`."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results.json"
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One number. `baseline` is that of the raw alternative, measured in the same run.

    `ok` is None where there is no budget.
    """

    name: str
    unit: str
    value: float
    baseline: float | None = None
    ratio: float | None = None
    budget: str | None = None
    ok: bool | None = None


def row(
    name: str,
    unit: str,
    value: float,
    baseline: float | None = None,
    *,
    budget: str | None = None,
    ok: bool | None = None,
) -> Row:
    """A row with its numbers rounded and their ratio."""
    ratio = value / baseline if baseline else None
    return Row(name, unit, _round(value), _rounded(baseline), _rounded(ratio), budget, ok)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; of few values, the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    lines = [_cells(each) for each in rows]
    head = ("what", "unit", "hostd", "raw", "ratio", "budget", "")
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 1, 5, 6) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *lines]
    )


def write_results(rows: Sequence[Row]) -> None:
    text = json.dumps([asdict(each) for each in rows], indent=2)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def write_docs(rows: Sequence[Row], machine: Sequence[str]) -> None:
    """Replace the text between the two marks; the prose around it is kept."""
    head = "| what | unit | hostd | raw | ratio | budget | |"
    rule = "| --- | --- | --: | --: | --: | --- | --- |"
    lines = ["| " + " | ".join(_cells(each)) + " |" for each in rows]
    missed = [each.name for each in rows if each.ok is False]
    verdict = "All budgets are met." if not missed else "Missed: " + "; ".join(missed) + "."
    numbers = "\n".join([*(f"- {fact}" for fact in machine), "", head, rule, *lines, "", verdict])
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{numbers}\n{END}{after}", encoding="utf-8")


def _cells(each: Row) -> tuple[str, ...]:
    verdict = {True: "met", False: "MISSED", None: ""}[each.ok]
    return (
        each.name,
        each.unit,
        _number(each.value),
        _number(each.baseline),
        _number(each.ratio),
        each.budget or "",
        verdict,
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return (
        f"{value:,.0f}"
        if abs(value) >= 1000
        else f"{value:.3g}"
        if abs(value) < 100
        else f"{value:.0f}"
    )


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _rounded(value: float | None) -> float | None:
    return None if value is None else _round(value)
