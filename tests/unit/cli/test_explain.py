"""`hostd explain` takes the command line of the command that it explains, and asks the worker."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import click.testing
import pytest

from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from tests.unit.cli.hostd import hostd
from tests.unit.control.control_socket import control_server
from worker.cli import commands
from worker.cli.explain import EXPLAINED, SENDING, explain
from worker.control.explain import ExplainRoute
from worker.control.routes import Answer, Route

ANSWER: Mapping[str, Any] = {
    "v": 1,
    "type": "StopInstance",
    "lane": "instance.acme.web.i-1",
    "before": [
        {"id": "c1", "type": "StartInstance", "state": "running", "effect": "supersedes"},
    ],
    "provisional": True,
    "refused": None,
    "changes": True,
    "status": "stopped",
    "why": None,
    "waits": ["the network lock of acme"],
    "steps": [
        {"name": "stop_vmm", "outcome": "done"},
        {"name": "remove_vmm", "outcome": "done", "key": "j-1", "there": True},
        {"name": "remove_jail", "outcome": "done", "key": "j-1", "there": False},
        {"name": "tap", "outcome": "done", "key": "tn3i5", "there": False},
        {"name": "cgroup", "outcome": "found", "key": "acme/j-1", "there": True},
    ],
}
REFUSED: Mapping[str, Any] = {
    **ANSWER,
    "before": [],
    "provisional": False,
    "refused": {
        "code": "draining",
        "message": "host is drained",
        "retryable": True,
        "detail": {"mode": "wait", "act": "scheduler"},
    },
    "changes": False,
    "waits": [],
    "steps": [],
}
LINE = ("explain", "stop", "acme", "web", "i-1")


async def ask(directory: Path, found: Answer, *args: str) -> tuple[click.testing.Result, object]:
    """Run it against a socket with this answer; what it printed, and what it asked."""
    asked: list[object] = []

    async def answer(request: object) -> Answer:
        asked.append(request)
        return found

    async with control_server(directory, Route("POST", "/v1/explain", ExplainRoute(answer).answer)):
        result = await asyncio.to_thread(hostd, *args, HOSTD_PATHS_RUN=str(directory))
    return result, asked[0]


async def test_an_explanation_is_printed_as_text(tmp_path: Path) -> None:
    result, asked = await ask(tmp_path, ANSWER, *LINE)

    assert asked == {"StopInstance": {"tenant_id": "acme", "pool_id": "web", "instance_id": "i-1"}}
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "StopInstance of lane instance.acme.web.i-1 would be run and leave it stopped",
        "  it supersedes StartInstance c1, which is running",
        "  these come first: what follows is of now, not of then",
        "  it waits for the network lock of acme",
        "   1. stop_vmm",
        "   2. remove_vmm j-1: is there",
        "   3. remove_jail j-1: is gone already",
        "   4. tap tn3i5: is made",
        "   5. cgroup acme/j-1: is there, checked",
    ]


async def test_a_refusal_is_the_exit_code(tmp_path: Path) -> None:
    text, _ = await ask(tmp_path, REFUSED, *LINE)
    as_json, _ = await ask(tmp_path, REFUSED, *LINE, "--json")

    assert text.exit_code == as_json.exit_code == 18
    assert text.stdout.splitlines() == [
        f"StopInstance of lane {REFUSED['lane']} would be refused: draining: host is drained",
        "  mode: wait",
        "  act: scheduler",
    ]
    assert json.loads(as_json.stdout) == REFUSED


async def test_a_ping_is_explained_as_the_worker_answers(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        found = await worker.explain.explain("Ping")

    result, asked = await ask(tmp_path, found, "explain", "ping")

    assert asked == "Ping"
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "Ping of lane host would change nothing: it is answered at once, by no lane"
    ]


async def test_options_of_the_command_are_part_of_the_question(tmp_path: Path) -> None:
    line = ("explain", "sleep", "acme", "web", "i-1", "--force", "--drain-timeout", "7")

    _, asked = await ask(tmp_path, ANSWER, *line)

    assert asked == {
        "SleepInstance": {
            "tenant_id": "acme", "pool_id": "web", "instance_id": "i-1", "force": True,
            "drain_timeout_secs": 7,
        }
    }  # fmt: skip


def test_every_command_that_is_sent_can_be_explained_by_its_own_arguments() -> None:
    sent = {each.name: each for each in vars(commands).values() if isinstance(each, click.Command)}

    assert {each.name for each in EXPLAINED} == sent.keys() == explain.commands.keys()
    for name, command in sent.items():
        taken = {param.name for param in explain.commands[str(name)].params}
        assert taken == {param.name for param in command.params} - SENDING


@pytest.mark.parametrize("option", ["--host", "--url", "--timeout"])
def test_how_to_send_is_not_asked(option: str) -> None:
    assert hostd(*LINE, option, "1").exit_code == 2
