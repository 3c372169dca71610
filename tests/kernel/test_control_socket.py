"""The control socket as other programs see it: curl, and a process of another user."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
import structlog

from handlers.errors import Conflict
from tests.unit.control.control_socket import control_server
from worker.control.endpoint import SOCKET
from worker.control.routes import Answer, Body, Route

CONNECT = """
import os, socket, sys
os.chdir(sys.argv[1])  # as root: the directories above may be closed to others
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
client = socket.socket(socket.AF_UNIX)
try:
    client.connect(sys.argv[2])
    client.sendall(b"GET /v1/state HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    print(client.recv(100))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def run() -> Iterator[Path]:
    """A directory that every user can enter."""
    directory = Path(tempfile.mkdtemp(prefix="hostd-control-", dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


async def state(body: Body) -> Answer:
    if body:
        raise Conflict("busy")
    return {"ok": True}


async def work(body: Body) -> AsyncGenerator[Answer]:
    yield {"progress": 1}
    yield {"result": body}


ROUTES = (
    Route("GET", "/v1/state", state),
    Route("POST", "/v1/state", state),
    Route("POST", "/v1/work", work),
)


async def output_of(*command: str) -> bytes:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(20):
        output, _ = await process.communicate()
    return output


async def curl(run: Path, path: str, *options: str) -> tuple[int, str]:
    """Status and body."""
    output = await output_of(
        *("curl", "-sS", "--unix-socket", f"{run}/{SOCKET}", "-w", "\n%{http_code}"),
        *options,
        f"http://localhost{path}",
    )
    body, _, status = output.decode().rpartition("\n")
    return int(status), body


async def test_curl_gets_an_answer_an_error_and_lines(run: Path) -> None:
    async with control_server(run, *ROUTES):
        status, body = await curl(run, "/v1/state")
        failed = await curl(run, "/v1/state", "--json", '{"a": 1}')
        lines = await curl(run, "/v1/work", "--json", '{"a": 1}')
        unknown = await curl(run, "/")

    assert (status, json.loads(body)) == (200, {"ok": True})
    assert (failed[0], json.loads(failed[1])["error"]["code"]) == (409, "conflict")
    assert lines == (200, '{"progress":1}\n{"result":{"a":1}}\n')
    assert unknown[0] == 404


async def test_another_user_cannot_connect(run: Path) -> None:
    async with control_server(run, *ROUTES):
        output = await output_of(sys.executable, "-c", CONNECT, str(run), SOCKET)

    assert output == b"PermissionError\n"


async def test_another_user_gets_nothing_even_if_somebody_opened_the_socket(run: Path) -> None:
    with structlog.testing.capture_logs() as logged:
        async with control_server(run, *ROUTES):
            os.chmod(run / SOCKET, 0o666)
            output = await output_of(sys.executable, "-c", CONNECT, str(run), SOCKET)

    assert output in (b"b''\n", b"BrokenPipeError\n", b"ConnectionResetError\n")
    assert [(line["event"], line["uid"]) for line in logged] == [("control.refused", 65534)]
