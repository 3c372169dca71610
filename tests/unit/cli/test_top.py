"""`hostd top` against a server with a test route, and shell completion."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.unit.cli.hostd import hostd
from tests.unit.control.control_socket import control_server
from worker.cli.main import COMMANDS, main
from worker.cli.state import view_of
from worker.control.routes import Answer, Body, Route

TOP: Mapping[str, Any] = {
    "host_id": "h1",
    "host_state": "degraded",
    "failed_checks": ["can_commit"],
    "capacity": {"mem_mib": 1000, "mem_free_mib": 400, "instances": 2, "vcpus_used": 2},
    "instances": {"running": 2},
    "networks": 1,
    "lanes": {"busy": 1, "waiting": 0},
    "unfinished": 3,
    "finished": {"ok": 10, "failed": 2},
    "unsent": 4,
    "connected": True,
    "slots": {"boots": {"count": 8, "held": 8, "waiting": 3}},
    "running": [
        {
            "id": "c1",
            "type": "StartInstance",
            "lane": "instance.acme.web.i-1",
            "steps": ["wait_agent"],
            "since_s": 1.25,
        }
    ],
}


async def test_one_look_is_printed_as_text_or_json(tmp_path: Path) -> None:
    async def top(body: Body) -> Answer:
        return TOP

    async with control_server(tmp_path, Route("GET", "/v1/top", top)):
        environment = {"HOSTD_PATHS_RUN": str(tmp_path)}
        text = await asyncio.to_thread(hostd, "top", "--once", **environment)
        as_json = await asyncio.to_thread(hostd, "top", "--once", "--json", **environment)

    assert text.exit_code == 0
    assert text.stdout.splitlines() == [
        "h1: degraded, not ready: can_commit, NATS connected",
        "instances: running 2; networks 1; memory free 400 of 1000 MiB",
        "commands: 3 unfinished, 1 lanes busy, 0 with a queue; 10 ok, 2 failed; 4 unsent",
        "slots: boots 8/8 +3 waiting",
        "       1.2 s  StartInstance    instance.acme.web.i-1  wait_agent  c1",
    ]
    assert json.loads(as_json.stdout) == TOP


def test_rates_are_those_since_the_look_before() -> None:
    before = 10.0, {**TOP, "finished": {"ok": 4, "failed": 0}}

    lines = [*view_of((14.0, TOP), before)]

    assert "; 2.0 per second; 4 unsent" in lines[2]


@pytest.mark.parametrize(
    ("shell", "part"),
    [("bash", "complete -o nosort -F"), ("zsh", "compdef"), ("fish", "complete --no-files")],
)
def test_each_shell_gets_a_script_that_asks_hostd(shell: str, part: str) -> None:
    result = hostd("completion", shell)

    assert result.exit_code == 0
    assert part in result.stdout
    assert f"_HOSTD_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.parametrize(
    ("words", "wanted"), [("hostd dr", {"drain"}), ("hostd drain --mode s", {"sleep", "stop"})]
)
def test_what_the_script_asks_is_answered(words: str, wanted: set[str]) -> None:
    environment = {
        "_HOSTD_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }

    result = CliRunner().invoke(main, [], prog_name="hostd", env=environment)

    assert {line.partition(",")[2] for line in result.stdout.splitlines()} == wanted
    assert "drain" in COMMANDS
