"""Logs: one JSON object per line, errors as text, secrets hidden."""

import json
from collections.abc import Iterator

import pytest
import structlog

from handlers.errors import Unavailable
from worker import logs

Lines = pytest.CaptureFixture[str]


@pytest.fixture
def out(capsys: Lines) -> Iterator[Lines]:
    logs.configure("info")
    yield capsys
    structlog.reset_defaults()


def test_a_line_is_json_with_event_level_time_and_fields(out: Lines) -> None:
    structlog.get_logger().info("command.done", code="ok", took_us=12)

    line = json.loads(out.readouterr().out)
    assert line.pop("at").endswith("Z")
    assert line == {"event": "command.done", "level": "info", "code": "ok", "took_us": 12}


def test_below_the_level_nothing_is_written(out: Lines) -> None:
    structlog.get_logger().debug("lane.woke")

    assert out.readouterr().out == ""


def test_bound_facts_are_on_every_line(out: Lines) -> None:
    with structlog.contextvars.bound_contextvars(command_id="c1", lane="host"):
        structlog.get_logger().info("step.done")

    assert json.loads(out.readouterr().out)["command_id"] == "c1"


def test_an_error_as_a_field_reads_as_class_and_text(out: Lines) -> None:
    structlog.get_logger().warning("step.left_behind", error=Unavailable("link is busy"))

    assert json.loads(out.readouterr().out)["error"] == "Unavailable: link is busy"


def test_a_traceback_stays_on_the_line(out: Lines) -> None:
    try:
        raise ValueError("x")
    except ValueError:
        structlog.get_logger().exception("command.crashed")

    (line,) = out.readouterr().out.splitlines()
    assert "ValueError: x" in json.loads(line)["exception"]


def test_values_of_telling_names_are_hidden(out: Lines) -> None:
    structlog.get_logger().error("drive.made", secrets="hunter2", creds="x")

    line = out.readouterr().out
    assert "hunter2" not in line
    assert json.loads(line)["creds"] == "(hidden)"


def test_a_command_line_keeps_its_stdout_for_the_result(capsys: Lines) -> None:
    logs.configure("warning", stream="stderr")
    structlog.get_logger().warning("bus.failed")
    structlog.reset_defaults()

    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["event"] == "bus.failed"
