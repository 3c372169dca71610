"""`hostd sweep`: what is shown, and the exit code."""

import asyncio
from pathlib import Path

import pytest

from tests.unit.cli.hostd import hostd
from tests.unit.control.control_socket import control_server
from worker.control.routes import Answer, Body, Route


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(("state", "exit_code"), [("removed", 0), ("kept", 0), ("failed", 20)])
async def test_a_removal_that_failed_is_in_the_exit_code(
    tmp_path: Path, state: str, exit_code: int, form: tuple[str, ...]
) -> None:
    orphan = {"kind": "jails", "name": "x", "state": state, "seen_s": 90, "reason": "why"}

    async def sweep(body: Body) -> Answer:
        return {"orphans": [orphan]}

    async with control_server(tmp_path, Route("POST", "/v1/sweep", sweep)):
        result = await asyncio.to_thread(hostd, "sweep", *form, HOSTD_PATHS_RUN=str(tmp_path))

    assert result.exit_code == exit_code
    assert state in result.stdout
