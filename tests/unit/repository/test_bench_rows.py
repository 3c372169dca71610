"""What is measured is told truly: ratios, budgets, and the prose of the page around the numbers."""

import json
from pathlib import Path

import pytest

from bench import rows
from bench.rows import BEGIN, END, p99, row

KEPT = row("a", "ms", 12.3456, 10, budget="at most 3 ms more", ok=True)
MISSED = row("b", "ms", 20, 10, budget="at most 3 ms more", ok=False)


def test_a_row_has_the_ratio_of_both_numbers() -> None:
    assert (KEPT.value, KEPT.baseline, KEPT.ratio) == (12.35, 10, 1.235)
    assert row("c", "MiB", 5).ratio is None


def test_p99_of_few_values_is_the_largest() -> None:
    assert p99([3, 1, 2]) == 3
    assert p99(list(range(1000))) == 990


def test_the_results_hold_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results.json")

    rows.write_results([KEPT])

    (found,) = json.loads((tmp_path / "results.json").read_text())
    assert found.keys() == {"name", "unit", "value", "baseline", "ratio", "budget", "ok"}


def test_the_page_names_the_machine_and_what_is_missed_and_keeps_its_prose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(rows, "DOCS", page)

    rows.write_docs([KEPT, MISSED], ["CPU: one"])

    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "- CPU: one" in text
    assert "Missed: b." in text
