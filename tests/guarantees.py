"""The tests that docs/guarantees.md names: a pytest plugin that, in CI, wants each to have passed.

A run of part of the suite is not judged, and neither are tests that the caller deselected.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.kinds import is_part_of_a_run, is_whole_suite, told_to_the_first

PAGE: Final = Path(__file__).parents[1] / "docs" / "guarantees.md"
ID: Final = re.compile(r"`(tests/[\w/]+\.py::test_\w+)`")
INSIDE: Final = "tests/lab/inside/"  # run in the lab; outside each is a parameter of one test
OUTSIDE: Final = "tests/lab/test_lab.py::test_in_the_lab"


def named(text: str) -> list[str]:
    """The test IDs of a page, each once, in its order."""
    return list(dict.fromkeys(ID.findall(text)))


def as_run(test_id: str) -> str:
    """The prefix of the node IDs under which a named test is reported here."""
    if test_id.startswith(INSIDE):
        return f"{OUTSIDE}[{test_id.partition('::')[2]}]"
    return test_id


def unproven(names: Iterable[str], passed: Iterable[str], deselected: Iterable[str]) -> list[str]:
    """Those of the names of which no parameter passed, unless the caller deselected it."""
    known = {_base(node) for nodes in (passed, deselected) for node in nodes}
    return [name for name in names if as_run(name) not in known]


def _base(node: str) -> str:
    """A node ID without its parameters; of the lab's tests the parameter is the name."""
    return node if node.startswith(OUTSIDE) else node.partition("[")[0]


class Guarantees:
    """Notes what is deselected, and judges the run at its end."""

    def __init__(self) -> None:
        self.deselected: list[str] = []

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.deselected += [item.nodeid for item in items]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A process of a split run (`-n 2`) has ended."""
        self.deselected += getattr(node, "workeroutput", {}).get("deselected", [])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if is_part_of_a_run(session.config):
            told_to_the_first(session.config)["deselected"] = self.deselected
            return
        if not os.environ.get("CI") or not is_whole_suite(session.config) or exitstatus:
            return  # what failed has failed the run already
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        passed = [report.nodeid for report in reporter.stats.get("passed", [])]
        for name in unproven(named(PAGE.read_text("utf-8")), passed, self.deselected):
            reporter.write_line(f"a guarantee without its proof: {name} did not run and pass")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Guarantees(), "guarantees")
