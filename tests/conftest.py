"""How many tests of each kind ran is part of the result: a kind that ran none fails CI."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
import uvloop
from hypothesis import HealthCheck, settings

from tests.kinds import KINDS, is_part_of_a_run, is_whole_suite

# The same examples in every run, and no verdict by the clock of a busy machine.
settings.register_profile(
    "hostd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hostd")

pytest_plugins = ["pytester", "tests.leaks", "tests.guarantees", "tests.side_by_side"]

HERE = Path(__file__).parent


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests that are coroutines run on the worker's loop (ADR 0961), but for those that show a
    defect of asyncio's own: `@pytest.mark.plain_loop`."""
    if item.get_closest_marker("plain_loop"):
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """A level or a stream that one test chose is not the next one's."""
    yield
    structlog.reset_defaults()


def kind_of(nodeid_path: Path) -> str:
    """The directory below tests/ names the kind."""
    return nodeid_path.relative_to(HERE).parts[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran: dict[str, int] = dict.fromkeys(KINDS, 0)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            kind = Path(report.nodeid.split("::")[0]).parts[1]
            ran[kind] = ran.get(kind, 0) + 1
    terminalreporter.write_line("tests by kind: " + ", ".join(f"{k} {n}" for k, n in ran.items()))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI, with the whole suite asked for, each kind must have run at least one test."""
    if not os.environ.get("CI") or not is_whole_suite(session.config) or exitstatus:
        return
    if is_part_of_a_run(session.config):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    kinds = {Path(r.nodeid.split("::")[0]).parts[1] for r in reporter.stats.get("passed", [])}
    if missing := set(KINDS) - kinds:
        reporter.write_line(f"no test ran of kind: {', '.join(sorted(missing))}")
        session.exitstatus = 1
