"""Prints what a reader of this run has to know: the seed of the points, the previous release."""

import pytest

from tests.crash.points import SEED, seed
from tests.previous_release import built


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if "::test_a_killed_command_has_one_effect_and_one_reply[" in report.nodeid
    ]
    if ran:
        terminalreporter.write_line(f"points of kill -9: {len(ran)}, {SEED}={seed()}")
    for source in dict.fromkeys(release.source for release in built):
        terminalreporter.write_line(f"previous release: {source}")
