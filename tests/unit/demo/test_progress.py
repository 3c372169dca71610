"""Progress output of the demo: one line per step, its name shown while it runs."""

import pytest

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
