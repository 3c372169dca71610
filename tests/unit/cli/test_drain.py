"""`hostd drain` and `hostd undrain`: what is sent, shown, and the exit code."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from click.testing import Result

from tests.unit.cli.hostd import hostd
from tests.unit.control.control_socket import control_server
from worker.control.routes import Answer, Body, Route

COUNTS = {"in_use": 2, "in_progress": 1, "done": 3, "failed": 1, "unknown": 0}


async def run(tmp_path: Path, *args: str, left: int = 0) -> tuple[Result, list[Any]]:
    bodies: list[Any] = []

    async def drain(body: Body) -> AsyncGenerator[Answer]:
        bodies.append(body)
        yield {"progress": {"mode": "sleep", **COUNTS}}
        yield {"progress": {"mode": "sleep", **COUNTS}}
        yield {
            "result": {
                "draining": True,
                "mode": "sleep",
                "empty": left == 0,
                **COUNTS,
                "in_use": left,
                "left": [
                    {
                        "tenant_id": "acme",
                        "pool_id": "web",
                        "instance_id": "i-1",
                        "status": "running",
                        "code": "host_fault",
                        "message": "disk error",
                    }
                ][:left],
            }
        }

    async def undrain(body: Body) -> Answer:
        bodies.append(body)
        return {"was_draining": left > 0, "was_quarantined": False}

    routes = (Route("POST", "/v1/drain", drain), Route("POST", "/v1/undrain", undrain))
    async with control_server(tmp_path, *routes):
        result = await asyncio.to_thread(hostd, *args, HOSTD_PATHS_RUN=str(tmp_path))
    return result, bodies


async def test_an_empty_host_is_ok_and_new_progress_is_on_stderr(tmp_path: Path) -> None:
    result, bodies = await run(tmp_path, "drain", "--mode", "sleep", "--timeout", "5")

    assert (result.exit_code, bodies) == (0, [{"mode": "sleep", "timeout_s": 5.0}])
    assert result.stderr == (
        "draining (sleep): 2 instances in use, 1 in progress, 3 done, 1 failed\n"
    )
    assert result.stdout.startswith("ok: no instance has a VMM")


async def test_what_still_runs_is_named_with_why_and_the_exit_code_says_so(
    tmp_path: Path,
) -> None:
    result, bodies = await run(tmp_path, "drain", left=3)

    assert (result.exit_code, bodies) == (15, [{"mode": "wait"}])
    assert "  acme/web/i-1 running: host_fault: disk error\n  and 2 more\n" in result.stdout


async def test_with_json_each_line_is_one_of_the_worker(tmp_path: Path) -> None:
    result, _ = await run(tmp_path, "drain", "--json", left=1)

    progress, _, last = map(json.loads, result.stdout.splitlines())
    assert progress["progress"]["done"] == 3
    assert last["result"]["left"][0]["instance_id"] == "i-1"
    assert (result.exit_code, result.stderr) == (15, "")


async def test_undrain_says_whether_it_changed_anything(tmp_path: Path) -> None:
    changed, _ = await run(tmp_path, "undrain", left=1)
    unchanged, _ = await run(tmp_path, "undrain")

    assert (changed.exit_code, changed.stdout) == (0, "ok\n")
    assert "no change" in unchanged.stdout
