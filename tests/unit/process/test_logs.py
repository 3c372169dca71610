"""Logs: one JSON object per line, errors as text, secrets hidden, every event documented."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from handlers.errors import Unavailable
from worker import logs

Lines = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[3]
LEVELS = ("debug", "info", "warning", "error", "exception")


def logged() -> Iterator[tuple[str, str, str]]:
    """Event, level and place of each log call in the code."""
    for path in sorted([*ROOT.glob("worker/**/*.py"), *ROOT.glob("handlers/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(
                        value=ast.Name(id="log") | ast.Attribute(attr="_log"), attr=level
                    ),
                    args=[event, *_],
                ) if level in LEVELS:
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    assert isinstance(event, ast.Constant), f"{place}: the event is not a constant"
                    yield str(event.value), level.replace("exception", "error"), place
                case _:
                    pass


@pytest.fixture
def out(capsys: Lines) -> Lines:
    logs.configure("info")
    return capsys


def test_a_line_is_json_with_event_level_time_and_fields(out: Lines) -> None:
    structlog.get_logger().info("command.done", code="ok", took_us=12)

    line = json.loads(out.readouterr().out)
    assert line.pop("at").endswith("Z")
    assert line == {"event": "command.done", "level": "info", "code": "ok", "took_us": 12}


def test_below_the_level_nothing_is_written(out: Lines) -> None:
    structlog.get_logger().debug("query.answer_lost")

    assert out.readouterr().out == ""


def test_bound_facts_are_on_every_line(out: Lines) -> None:
    with structlog.contextvars.bound_contextvars(command_id="c1", lane="host"):
        structlog.get_logger().info("command.retried")

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


def test_values_of_fields_with_sensitive_names_are_hidden(out: Lines) -> None:
    structlog.get_logger().error("worker.started", secrets="hunter2", creds="x")

    line = out.readouterr().out
    assert "hunter2" not in line
    assert json.loads(line)["creds"] == "(hidden)"


def test_a_command_line_keeps_its_stdout_for_the_result(capsys: Lines) -> None:
    logs.configure("warning", stream="stderr")
    structlog.get_logger().warning("bus.disconnected")

    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["event"] == "bus.disconnected"


def test_each_event_is_named_noun_dot_verb() -> None:
    wrong = [each for each in logged() if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", each[0])]

    assert wrong == []


def test_the_operators_page_lists_each_event_with_its_levels() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    listed = re.findall(r"^\| `([a-z_]+\.[a-z_.]+)` \| ([a-z, ]+) \|", page, re.MULTILINE)
    levels: dict[str, set[str]] = {}
    for event, level, _ in logged():
        levels.setdefault(event, set()).add(level)

    assert len(listed) == len(dict(listed)), "an event is listed twice"
    assert {event: set(text.split(", ")) for event, text in listed} == levels
