"""The fleet page of `hostd demo --page`: its files, and a way for the browser to the demo's NATS.

The demo is in a network namespace of its own, the browser is not: both sockets are made on loopback
before the namespace is entered, and stay where they were made. Source: network_namespaces(7).
"""

import asyncio
import contextlib
import functools
import http.server
import json
import os
import socket
import threading
from collections.abc import AsyncGenerator
from http import HTTPStatus

from worker.demo.progress import DemoFailed

CHUNK = 65536


class PagePorts:
    """Two listening sockets on 127.0.0.1 of the present namespace: of the page and of NATS."""

    def __init__(self) -> None:
        self.files, self.bus = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.files.getsockname()[1]}/"

    @property
    def bus_url(self) -> str:
        return f"ws://127.0.0.1:{self.bus.getsockname()[1]}"


@contextlib.asynccontextmanager
async def page_served(
    ports: PagePorts, directory: str, cell: str, web_port: int
) -> AsyncGenerator[None]:
    """Serve the built page in `directory`; its NATS is at `web_port` of this namespace.

    Raises:
        DemoFailed: the page is not built.
    """
    if not os.path.exists(os.path.join(directory, "app.js")):
        raise DemoFailed(f"no fleet page in {directory}: run `make setup`")
    config = {"url": ports.bus_url, "cell": cell, "connect": True}
    handler = functools.partial(_Files, directory=directory, config=json.dumps(config).encode())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
    server.socket.close()
    server.socket = ports.files
    thread = threading.Thread(target=server.serve_forever, name="demo-page", daemon=True)
    thread.start()
    forward = _Forward(web_port)
    try:
        async with await asyncio.start_server(forward, sock=ports.bus) as listener:
            try:
                yield
            finally:
                listener.close()
                await forward.end()
    finally:
        server.shutdown()
        server.server_close()


class _Files(http.server.SimpleHTTPRequestHandler):
    """The files of a directory, and `config.json`."""

    def __init__(self, *args: object, directory: str, config: bytes) -> None:
        self._config = config
        super().__init__(*args, directory=directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/config.json":
            super().do_GET()
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self._config)))
        self.end_headers()
        self.wfile.write(self._config)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
        """Nothing: the demo's output is its steps."""


class _Forward:
    """Copies each connection to a port of this namespace, until either side ends."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, writer))
        self._open[task] = writer
        task.add_done_callback(self._open.pop)

    async def end(self) -> None:
        """End what browsers keep open: since Python 3.12 a server that is left waits for it.

        Aborted, not closed: a browser that does not read would keep what is not sent yet.
        """
        tasks = dict(self._open)
        for task, writer in tasks.items():
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            with contextlib.closing(back):
                ways = ((reader, back), (there, writer))
                copies = [asyncio.create_task(_copy(*way)) for way in ways]
                try:
                    await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for copy in copies:
                        copy.cancel()
                    await asyncio.gather(*copies, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
