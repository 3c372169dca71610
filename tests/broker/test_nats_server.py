"""The embedded server: start, restart, and its end with the process that started it."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from handlers.errors import HostFault
from tests.broker.server import Server, connection_to, eventually, running_server
from worker.demo.nats_server import EmbeddedNats

PARENT = """
import asyncio, sys
from worker.demo.nats_server import EmbeddedNats

async def main():
    server = EmbeddedNats(sys.argv[1])
    await server.start()
    print(server.process.pid(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_streams_survive_a_restart_on_the_same_url(server: Server) -> None:
    before = server.url
    async with connection_to(server.url) as admin:
        body = b'{"name": "S", "subjects": ["s.>"]}'
        assert b'"error"' not in (await admin.request("$JS.API.STREAM.CREATE.S", body)).data
        await admin.request("s.x", b"kept")

        await server.stop()
        await server.stop()
        assert await server.start() == before

        assert await eventually(lambda: admin.reconnects == 1, 10)
        assert b'"messages":1' in (await admin.request("$JS.API.STREAM.INFO.S", b"")).data


async def test_a_server_that_cannot_start_names_its_log(tmp_path: Path) -> None:
    server = EmbeddedNats(str(tmp_path), config="no such setting: {")

    with pytest.raises(HostFault, match=r"nats\.log"):
        await server.start()


async def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostFault, match="/no/such/nats-server"):
        async with running_server(tmp_path, program="/no/such/nats-server"):
            pass


async def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await asyncio.wait_for(parent.stdout.readline(), 20))
    watched = os.pidfd_open(pid)
    try:
        parent.send_signal(signal.SIGKILL)
        await parent.wait()
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(watched, ended.set)

        await asyncio.wait_for(ended.wait(), 10)
    finally:
        asyncio.get_running_loop().remove_reader(watched)
        os.close(watched)
