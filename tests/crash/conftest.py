"""Prints what a reader of this run has to know: the seed of the points, the previous release.

Where the run is split over processes (`-n 2`), each tells the first, which prints.
"""

from typing import Any

import pytest

from tests.crash.points import SEED, seed
from tests.kinds import is_part_of_a_run, told_to_the_first
from tests.previous_release import built

_seeds: list[str] = []
_sources: list[str] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    sources = [release.source for release in built]
    if is_part_of_a_run(session.config):
        told_to_the_first(session.config)["crash"] = (seed(), sources)
    else:
        _sources.extend(sources)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of a split run has ended; of one that died nothing is known."""
    if told := getattr(node, "workeroutput", {}).get("crash"):
        _seeds.append(told[0])
        _sources.extend(told[1])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if "::test_a_killed_command_has_one_effect_and_one_reply[" in report.nodeid
    ]
    if ran:
        is_split = terminalreporter.config.pluginmanager.has_plugin("dsession")
        of_this_run = ", ".join(sorted(set(_seeds))) if is_split else seed()
        terminalreporter.write_line(f"points of kill -9: {len(ran)}, {SEED}={of_this_run}")
    for source in dict.fromkeys(_sources):
        terminalreporter.write_line(f"previous release: {source}")
