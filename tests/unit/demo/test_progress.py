"""Progress output of the demo, and its check of the resumed guest."""

import os
import sys
from pathlib import Path

import click
import pytest

from worker.demo import command
from worker.demo.command import check_resumed
from worker.demo.progress import DemoFailed, Progress, duration


def recorded() -> tuple[Progress, list[str]]:
    written: list[str] = []
    return Progress(lambda text, ends: written.append(text + "\n" * ends)), written


def test_a_step_is_named_while_it_runs_and_printed_with_its_facts() -> None:
    progress, written = recorded()

    with progress.step("start") as facts:
        assert "start" in "".join(written)
        facts += ["running", "pid 7"]

    line = "".join(written)
    assert line.count("\n") == 1
    assert line.endswith("running, pid 7\n")
    assert [(what, text) for what, _, text in progress.rows] == [("start", "running, pid 7")]


@pytest.mark.parametrize(
    ("error", "word"), [(DemoFailed("no"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_failed_step_ends_its_line(error: BaseException, word: str) -> None:
    progress, written = recorded()

    with pytest.raises(type(error)), progress.step("start"):
        raise error

    assert "".join(written).endswith(f"{word}\n")
    assert progress.rows == []


def test_durations_are_in_milliseconds_below_one_second() -> None:
    assert [duration(s) for s in (0.0123, 0.9994, 12.34)] == ["12.3 ms", "999.4 ms", "12.3 s"]


AWAKE = {"counter": 5, "boot_id": "a"}


@pytest.mark.parametrize(
    ("woken", "detail", "complaint"),
    [
        ({"counter": 6, "boot_id": "b"}, {}, "booted, not resumed"),
        ({"counter": 5, "boot_id": "a"}, {}, "counter 5 after wake"),
        ({"counter": 6, "boot_id": "a"}, {"agent_failed": "no"}, "wake notification failed"),
        ({"counter": 6, "boot_id": "a", "unix_nanos": 0}, {}, "clock is off"),
    ],
)
def test_a_guest_that_was_not_resumed_fails_the_demo(
    woken: dict[str, object], detail: dict[str, object], complaint: str
) -> None:
    with pytest.raises(DemoFailed, match=complaint):
        check_resumed(AWAKE, woken, {"detail": detail})


def test_where_kvm_cannot_run_linux_the_demo_is_executed_in_the_lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Became(Exception):
        """execv does not return."""

    def execv(path: str, argv: list[str]) -> None:
        raise Became(path, argv, os.getcwd())

    monkeypatch.setattr(command.os, "execv", execv)
    monkeypatch.chdir("/")
    with pytest.raises(click.ClickException, match="requires a source checkout"):
        command.hand_over_to_lab(str(tmp_path), as_json=False)
    (tmp_path / "tests/lab").mkdir(parents=True)
    (tmp_path / "tests/lab/run.py").touch()

    with pytest.raises(Became) as became:
        command.hand_over_to_lab(str(tmp_path), as_json=True)

    arguments = ["-m", "tests.lab.run", "--", "hostd", "demo", "--here", "--json"]
    assert became.value.args == (sys.executable, [sys.executable, *arguments], str(tmp_path))
