"""Rows as a table for a terminal and for `docs/benchmarks.md`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.report.rows import Measured, Row, Span

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
NUMBERS, WAKE = "numbers", "wake"
HEAD = ("what", "unit", "hostd", "raw", "ratio", "budget", "")
LEFT = (0, 1, 5, 6)
GAP_MS = 0.2


def table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    lines = [_cells(each) for each in rows]
    widths = [max(len(line[i]) for line in [HEAD, *lines]) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in LEFT else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [HEAD, *lines]
    )


def missed(rows: Sequence[Row]) -> str:
    """Sentences about the budgets."""
    names = [each.name for each in rows if each.ok is False and not each.at_floor]
    at_floor = [each.name for each in rows if each.at_floor]
    said = "Missed: " + "; ".join(names) + "." if names else "All budgets are met."
    if at_floor and not names:
        said = "All other budgets are met."
    return (f"At their floor: {'; '.join(at_floor)}. " if at_floor else "") + said


def timeline(spans: Sequence[Span]) -> list[tuple[str, str, str]]:
    """The spans by their begin, and as `gap` each stretch of time in which none of them is."""
    lines: list[tuple[str, str, str]] = []
    covered_ms = 0.0
    for span in sorted(spans, key=lambda each: (each.begins_ms, -each.takes_ms)):
        if span.begins_ms - covered_ms > GAP_MS:
            lines.append(("(gap)", f"{covered_ms:.1f}", f"{span.begins_ms - covered_ms:.1f}"))
        name = "\u2514 " * bool(span.indent) + span.name
        lines.append((name, f"{span.begins_ms:.1f}", f"{span.takes_ms:.1f}"))
        covered_ms = max(covered_ms, span.begins_ms + span.takes_ms)
    return lines


def write_docs(machine: Sequence[str], measured: Mapping[str, Measured]) -> None:
    """Replace the text between the marks; the prose around it is kept."""
    rows = [each for group in measured.values() for each in group.rows]
    numbers = [
        *(f"- {fact}" for fact in machine),
        "",
        "| what | unit | hostd | raw | ratio | budget | |",
        "| --- | --- | --: | --: | --: | --- | --- |",
        *("| " + " | ".join(_cells(each)) + " |" for each in rows),
        "",
        missed(rows),
    ]
    text = _replaced(DOCS.read_text(encoding="utf-8"), NUMBERS, numbers)
    spans = [each for group in measured.values() for each in group.spans]
    if spans:
        wake = [
            "| what | begins at, ms | takes, ms |",
            "| --- | --: | --: |",
            *("| " + " | ".join(line) + " |" for line in timeline(spans)),
        ]
        text = _replaced(text, WAKE, wake)
    DOCS.write_text(text, encoding="utf-8")


def mark(name: str, which: str) -> str:
    return f"<!-- {name}: {which} -->"


def _replaced(text: str, name: str, lines: Sequence[str]) -> str:
    begin, end = mark(name, "begin"), mark(name, "end")
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{DOCS}: expected the marks {begin} and {end}, found none: add them")
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}"


def _cells(each: Row) -> tuple[str, ...]:
    verdict = {True: "met", False: "MISSED", None: ""}[each.ok]
    if each.at_floor:
        verdict = "at its floor"
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
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
