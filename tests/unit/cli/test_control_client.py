"""The client of the control socket, and `hostd dump` by it, against a server with test routes."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from handlers.errors import Conflict
from schemas.settings import PathSettings, Settings
from tests.unit.cli.hostd import hostd
from tests.unit.control.control_socket import control_server
from worker.cli.context import CliError, NoAnswer, NoWorker
from worker.cli.control_client import ControlClient
from worker.control.endpoint import SOCKET
from worker.control.routes import Answer, Body, Route


def client(run: Path) -> ControlClient:
    return ControlClient(Settings(paths=PathSettings(run=str(run))))


async def in_thread(run: Path, *args: str) -> Result:
    return await asyncio.to_thread(hostd, *args, HOSTD_PATHS_RUN=str(run))


async def test_the_answer_of_a_route_is_printed_as_text_or_json(tmp_path: Path) -> None:
    async def state(body: Body) -> Answer:
        return {
            "host": {"host_id": "h1", "uptime_s": 3},
            "locks": [],
            "commands": {"shown": [{"id": "c1", "doing": ["boot"]}]},
        }

    async with control_server(tmp_path, Route("GET", "/v1/dump", state)):
        text = await in_thread(tmp_path, "dump")
        as_json = await in_thread(tmp_path, "dump", "--json")

    assert text.exit_code == 0
    assert text.stdout == (
        "host:\n  host_id: h1\n  uptime_s: 3\nlocks: none\n"
        "commands:\n  shown:\n    - id c1, doing boot\n"
    )
    assert json.loads(as_json.stdout)["host"]["host_id"] == "h1"


async def test_a_failure_has_the_exit_code_of_its_code(tmp_path: Path) -> None:
    async def fail(body: Body) -> Answer:
        raise Conflict("it runs")

    async with control_server(tmp_path, Route("GET", "/v1/dump", fail)):
        result = await in_thread(tmp_path, "dump")

    assert result.exit_code == 12
    assert result.stderr == "conflict: it runs\n"


async def test_without_a_worker_the_socket_is_named(tmp_path: Path) -> None:
    missing = await in_thread(tmp_path, "dump")
    async with control_server(tmp_path):
        (tmp_path / SOCKET).rename(tmp_path / "left")
    (tmp_path / "left").rename(tmp_path / SOCKET)
    dead = await in_thread(tmp_path, "dump")
    elsewhere = await in_thread(tmp_path / "none", "dump")

    for result in (missing, dead, elsewhere):
        assert result.exit_code == 30
        assert f"/{SOCKET}: start it, or check [paths] run" in result.stderr


async def test_progress_is_shown_as_it_comes_and_the_result_returned(tmp_path: Path) -> None:
    async def work(body: Body) -> AsyncGenerator[Answer]:
        for n in range(int(str(body["count"]))):
            yield {"progress": {"n": n}}
        yield {"result": {"done": True}}

    shown: list[Any] = []
    async with control_server(tmp_path, Route("POST", "/v1/work", work)):
        follow = client(tmp_path).follow
        result = await asyncio.to_thread(follow, "/v1/work", {"count": 2}, shown.append)

    assert (shown, result) == ([{"n": 0}, {"n": 1}], {"done": True})


async def test_a_failure_after_progress_and_a_cut_are_told_apart(tmp_path: Path) -> None:
    async def work(body: Body) -> AsyncGenerator[Answer]:
        yield {"progress": {}}
        if body:
            raise Conflict("no")

    shown: list[Any] = []
    async with control_server(tmp_path, Route("POST", "/v1/work", work)):
        follow = client(tmp_path).follow
        with pytest.raises(CliError, match="conflict: no"):
            await asyncio.to_thread(follow, "/v1/work", {"fail": True}, shown.append)
        with pytest.raises(NoAnswer, match="before the result"):
            await asyncio.to_thread(follow, "/v1/work", {}, shown.append)


async def test_a_worker_that_stops_meanwhile_is_no_answer(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def forever(body: Body) -> Answer:
        begun.set()
        await asyncio.Event().wait()
        return {}

    async with control_server(tmp_path, Route("GET", "/v1/dump", forever)):
        asking = asyncio.create_task(asyncio.to_thread(client(tmp_path).get, "/v1/dump"))
        await begun.wait()

    with pytest.raises(NoAnswer) as caught:
        await asking
    assert not isinstance(caught.value, NoWorker)
