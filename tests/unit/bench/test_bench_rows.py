"""What is measured is told truly: ratios, budgets, and the prose of the page around the numbers."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.groups import GROUPS
from bench.report import rows, table
from bench.report.budgets import (
    Budget,
    at_least,
    at_most,
    at_most_more,
    at_most_times,
    below_raw,
    faster,
    within_percent,
)
from bench.report.rows import Floors, Measured, Span, floor, kept, p99, row
from bench.report.table import NUMBERS, WAKE, mark, timeline
from bench.report.wanted import WANTED, not_measured

KEPT = row("a", "ms", [12.3456], [10.0], budget=at_most_more(3, "ms"))
MISSED = row("b", "ms", [20.0], [10.0], budget=at_most_more(3, "ms"))


def test_a_row_has_the_ratio_of_both_medians_and_all_samples() -> None:
    found = row("c", "ms", [1.0, 2.0, 9.0], [4.0])

    assert (found.value, found.baseline, found.ratio) == (2, 4, 0.5)
    assert (found.samples, found.baseline_samples) == ((1, 2, 9), (4,))
    assert row("c", "MiB", [5.0]).ratio is None


def test_p99_of_few_values_is_the_largest() -> None:
    assert p99([3, 1, 2]) == 3
    assert p99(list(range(1000))) == 990


def test_of_many_samples_evenly_chosen_ones_are_kept() -> None:
    assert kept(list(range(1000))) == tuple(range(0, 1000, 5))


@pytest.mark.parametrize(
    ("budget", "met", "missed"),
    [
        (at_most(8), (8, None), (8.1, None)),
        (at_least(2500), (2500, None), (2499, None)),
        (at_most_more(0.5, "ms"), (1.5, 1), (1.6, 1)),
        (at_most_times(1.2), (12, 10), (12.1, 10)),
        (below_raw(), (9, 10), (10, 10)),
        (faster(3), (10, 30), (10, 29)),
        (within_percent(10), (11, 10), (11.1, 10)),
        (at_most(8) & faster(3), (8, 24), (9, 30)),
    ],
)
def test_a_budget_holds_up_to_its_limit(
    budget: Budget, met: tuple[float, float | None], missed: tuple[float, float | None]
) -> None:
    assert budget.holds(*met)
    assert not budget.holds(*missed)


def test_a_budget_that_compares_needs_a_raw_number() -> None:
    with pytest.raises(ValueError, match="raw number"):
        row("c", "ms", [1.0], budget=below_raw())


KERNEL = floor("kernel", "ms", [1.0], [3.0])
LOOP = floor("loop", "ms", [1.0], [1.5])


@pytest.mark.parametrize(
    ("value", "floors", "ok", "at_floor"),
    [
        (11.0, Floors(added=(KERNEL,)), True, None),
        (13.0, Floors(), False, None),
        (13.0, Floors(added=(KERNEL,)), False, True),
        (13.1, Floors(added=(KERNEL,)), False, False),
        (15.0, Floors(added=(KERNEL, KERNEL)), False, True),
        (15.1, Floors(added=(KERNEL, KERNEL)), False, False),
        (16.5, Floors(slowed=(LOOP,)), False, True),
        (16.6, Floors(slowed=(LOOP,)), False, False),
        (18.5, Floors(added=(KERNEL,), slowed=(LOOP,)), False, True),
        (18.6, Floors(added=(KERNEL,), slowed=(LOOP,)), False, False),
    ],
)
def test_a_row_is_at_its_floor_if_the_budget_holds_without_what_the_floor_grew_by(
    value: float, floors: Floors, ok: bool, at_floor: bool | None
) -> None:
    found = row("c", "ms", [value], [10.0], budget=within_percent(10), floors=floors)

    assert (found.ok, found.at_floor) == (ok, at_floor)
    assert found.floors == tuple(each.name for each in (*floors.added, *floors.slowed))


def test_a_floor_that_did_not_grow_excuses_nothing() -> None:
    shrunk = floor("kernel", "ms", [3.0], [1.0])

    floors = Floors(added=(shrunk,), slowed=(shrunk,))

    assert floors.without(12.0) == 12


def test_a_floor_of_one_host_is_none_of_a_comparison() -> None:
    floors = Floors(added=(floor("kernel", "ms", [1.0]),))

    with pytest.raises(ValueError, match="on one"):
        row("c", "ms", [20.0], [10.0], budget=within_percent(10), floors=floors)


def test_what_is_at_its_floor_is_not_missed() -> None:
    reached = row(
        "c", "ms", [13.0], [10.0], budget=within_percent(10), floors=Floors(added=(KERNEL,))
    )

    assert table.missed([KEPT]) == "All budgets are met."
    assert table.missed([KEPT, reached]) == "At their floor: c. All other budgets are met."
    assert table.missed([MISSED, reached]) == "At their floor: c. Missed: b."
    assert "at its floor" in table.table([reached])
    assert rows.measured_of(asdict(Measured([reached]))) == Measured([reached])


def test_the_results_keep_the_groups_that_were_not_measured_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results.json")
    first = Measured([KEPT], [Span("boot", 1.0, 2.0)])
    second = Measured([floor("a commit", "ms", [0.5])])

    rows.write_results(["CPU: one"], {"first": first, "second": Measured([MISSED])})
    known = rows.write_results(["CPU: two"], {"second": second})

    assert known == {"first": first, "second": second}
    text = json.loads((tmp_path / "results.json").read_text())
    assert text["groups"]["first"]["machine"] == ["CPU: one"]


def test_a_timeline_shows_as_a_gap_what_no_span_covers() -> None:
    spans = [Span("b", 5.0, 1.0), Span("a", 0.0, 3.0), Span("within a", 1.0, 1.0, indent=1)]

    names = [name for name, _, _ in timeline(spans)]

    assert names == ["a", "\u2514 within a", "(gap)", "b"]


def test_the_page_names_the_machine_and_what_is_missed_and_keeps_its_prose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "benchmarks.md"
    marks = [f"{mark(name, 'begin')}\nold\n{mark(name, 'end')}\n" for name in (NUMBERS, WAKE)]
    page.write_text("before\n" + "between\n".join(marks) + "after\n")
    monkeypatch.setattr(table, "DOCS", page)

    table.write_docs(["CPU: one"], {"g": Measured([KEPT, MISSED], [Span("boot", 0.0, 2.0)])})

    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{mark(WAKE, 'end')}\nafter\n")
    assert "between" in text
    assert "old" not in text
    assert "- CPU: one" in text
    assert "Missed: b." in text
    assert "| boot | 0.0 | 2.0 |" in text


def test_every_wanted_row_belongs_to_a_group() -> None:
    assert set(WANTED) <= set(GROUPS)


def test_a_wanted_row_that_is_not_measured_or_has_no_budget_is_named() -> None:
    begin = WANTED["large"][0]
    without = Measured([row(begin, "ms", [1.0])])
    with_budget = Measured([row(f"{begin}, and more", "ms", [1.0], budget=at_most(2))])

    assert not_measured(["large"], {}) == [f"large: {begin}"]
    assert not_measured(["large"], {"large": without}) == [f"large: {begin}"]
    assert not_measured(["large"], {"large": with_budget}) == []


def test_the_kept_results_have_every_wanted_row_of_their_groups() -> None:
    kept = {name: rows.measured_of(group) for name, group in rows.read_results().items()}

    assert not_measured(kept, kept) == []
