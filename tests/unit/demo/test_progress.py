"""How the demo tells its story: one line a step, its name shown while it runs."""

import os
import sys
from pathlib import Path

import click
import pytest

from worker.demo import command
from worker.demo.command import remembered
from worker.demo.progress import DemoFailed, Story, duration


def story() -> tuple[Story, list[str]]:
    said: list[str] = []
    return Story(lambda text, ends: said.append(text + "\n" * ends)), said


def test_a_step_is_named_before_it_is_done_and_told_with_its_facts() -> None:
    told, said = story()

    with told.step("start") as facts:
        assert "start" in "".join(said)
        facts += ["running", "pid 7"]

    line = "".join(said)
    assert line.count("\n") == 1
    assert line.endswith("running, pid 7\n")
    assert [(what, text) for what, _, text in told.rows] == [("start", "running, pid 7")]


@pytest.mark.parametrize(
    ("error", "word"), [(DemoFailed("no"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_step_that_fails_ends_its_line(error: BaseException, word: str) -> None:
    told, said = story()

    with pytest.raises(type(error)), told.step("start"):
        raise error

    assert "".join(said).endswith(f"{word}\n")
    assert told.rows == []


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0.0123, 0.9994, 12.34)] == ["12.3 ms", "999.4 ms", "12.3 s"]


AWAKE = {"counter": 5, "boot_id": "a"}


@pytest.mark.parametrize(
    ("woken", "detail", "complaint"),
    [
        ({"counter": 6, "boot_id": "b"}, {}, "booted, not woken"),
        ({"counter": 5, "boot_id": "a"}, {}, "counter 5 after wake"),
        ({"counter": 6, "boot_id": "a"}, {"agent_failed": "no"}, "not told of its wake"),
        ({"counter": 6, "boot_id": "a", "unix_nanos": 0}, {}, "clock is"),
    ],
)
def test_a_guest_that_does_not_remember_fails_the_demo(
    woken: dict[str, object], detail: dict[str, object], complaint: str
) -> None:
    with pytest.raises(DemoFailed, match=complaint):
        remembered(AWAKE, woken, {"detail": detail})


def test_where_kvm_cannot_run_linux_the_demo_becomes_the_labs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Became(Exception):
        """execv does not return."""

    def execv(path: str, argv: list[str]) -> None:
        raise Became(path, argv, os.getcwd())

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.chdir("/")
    with pytest.raises(click.ClickException, match="part of a source checkout"):
        command.hand_over_to_lab(str(tmp_path), as_json=False)
    (tmp_path / "tests/lab").mkdir(parents=True)
    (tmp_path / "tests/lab/run.py").touch()

    with pytest.raises(Became) as became:
        command.hand_over_to_lab(str(tmp_path), as_json=True)

    arguments = ["-m", "tests.lab.run", "--", "hostd", "demo", "--here", "--json"]
    assert became.value.args == (sys.executable, [sys.executable, *arguments], str(tmp_path))
