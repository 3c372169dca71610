"""Logs: one JSON object per line, errors as text, secrets hidden."""

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from handlers.errors import Unavailable
from worker import logs


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    logs.configure("info", stream=stream)
    yield stream
    structlog.reset_defaults()


def test_a_line_is_json_with_event_level_time_and_fields(out: io.StringIO) -> None:
    structlog.get_logger().info("command.done", code="ok", took_us=12)

    line = json.loads(out.getvalue())
    assert line.pop("at").endswith("Z")
    assert line == {"event": "command.done", "level": "info", "code": "ok", "took_us": 12}


def test_below_the_level_nothing_is_written(out: io.StringIO) -> None:
    structlog.get_logger().debug("lane.woke")

    assert out.getvalue() == ""


def test_bound_facts_are_on_every_line(out: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(command_id="c1", lane="host"):
        structlog.get_logger().info("step.done")

    assert json.loads(out.getvalue())["command_id"] == "c1"


def test_an_error_as_a_field_reads_as_class_and_text(out: io.StringIO) -> None:
    structlog.get_logger().warning("step.left_behind", error=Unavailable("link is busy"))

    assert json.loads(out.getvalue())["error"] == "Unavailable: link is busy"


def test_a_traceback_stays_on_the_line(out: io.StringIO) -> None:
    try:
        raise ValueError("x")
    except ValueError:
        structlog.get_logger().exception("command.bug")

    (line,) = out.getvalue().splitlines()
    assert "ValueError: x" in json.loads(line)["exception"]


def test_values_of_telling_names_are_hidden(out: io.StringIO) -> None:
    structlog.get_logger().error("drive.made", secrets="hunter2", creds="x")

    assert "hunter2" not in out.getvalue()
    assert json.loads(out.getvalue())["creds"] == "(hidden)"
