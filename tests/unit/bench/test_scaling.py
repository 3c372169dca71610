"""The benchmark with thousands of instances in memory runs: one round of it, and every row."""

from pathlib import Path

from bench.report.wanted import WANTED
from bench.scaling import commands


async def test_a_round_has_every_command_beside_thousands_of_instances(tmp_path: Path) -> None:
    rows = await commands(tmp_path, 1)

    for begins in WANTED["scaling"][:-1]:  # the last one is of the recovery
        assert sum(row.name.startswith(begins) for row in rows) == 2, begins
    assert all(row.value and row.baseline for row in rows)
