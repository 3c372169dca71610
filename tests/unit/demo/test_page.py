"""The page of `hostd demo --page` ends although a browser is still connected."""

import asyncio
from pathlib import Path

from worker.demo.page import PagePorts, page_served


async def test_leaving_it_ends_the_connections_of_browsers(tmp_path: Path) -> None:
    """Since Python 3.12 a server that is left would wait for them; before, they stayed open."""
    (tmp_path / "app.js").touch()
    before = asyncio.all_tasks()
    held = asyncio.Event()

    async def nats(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(4))
        await held.wait()
        writer.close()

    server = await asyncio.start_server(nats, "127.0.0.1", 0)
    ports = PagePorts()
    port = ports.bus.getsockname()[1]
    async with asyncio.timeout(10):
        web_port = server.sockets[0].getsockname()[1]
        async with page_served(ports, str(tmp_path), "default", web_port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"PING")
            echoed = await reader.readexactly(4)
        try:
            rest = await reader.read()
        except ConnectionResetError:
            rest = b""
        held.set()
        writer.close()
        server.close()
        await server.wait_closed()
        while left := asyncio.all_tasks() - before:
            await asyncio.wait(left)

    assert (echoed, rest) == (b"PING", b"")
