"""Prints how many points of the commands this run killed at, and how to have the same again."""

import pytest

from tests.crash.points import SEED, seed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if "::test_a_killed_command_has_one_effect_and_one_reply[" in report.nodeid
    ]
    if ran:
        terminalreporter.write_line(f"points of kill -9: {len(ran)}, {SEED}={seed()}")
