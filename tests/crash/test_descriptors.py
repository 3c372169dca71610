"""A worker that has no free descriptor says so, logs little, and goes on once it has some."""

import asyncio
import contextlib
import json
import os
import resource
import socket
from collections.abc import Generator
from pathlib import Path

from tests.constants import START, STOP
from tests.live_host import live_host

ADDRESSES = 24
MAX_LOG_BYTES = 65_536


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def none_free(pid: int) -> Generator[None]:
    """Lower the limit to the first descriptor that is not in use: nothing more can be opened."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    first_free = next(number for number in range(len(used) + 1) if number not in used)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (first_free, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


async def probe(port: int) -> tuple[int, dict[str, bool]] | None:
    """Status and checks of `/readyz`; None if the connection was closed without an answer."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await reader.read()
        finally:
            writer.close()
    except ConnectionError:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)["checks"]) if head else None


async def ready(port: int) -> tuple[int, dict[str, bool]]:
    """Asked until it is answered: idle connections hold all places for some seconds."""
    async with asyncio.timeout(60):
        while (answer := await probe(port)) is None:
            await asyncio.sleep(0.1)
        return answer


async def test_without_a_free_descriptor_readyz_answers_and_commands_go_on_afterwards() -> None:
    port = unused_port()
    async with live_host(worker=False) as host:
        await host.start_worker(
            environment={
                "HOSTD_METRICS_LISTEN": f"127.0.0.1:{port}",
                "HOSTD_LIMITS_RETRY_BUDGET_S": "1",
            }
        )
        assert host.worker is not None
        await host.net_up(host.seed())
        assert (await host.run(START))["code"] == "ok"
        assert (await ready(port))[1]["has_descriptors"]
        log = Path(host.directory, "worker.log")
        size = log.stat().st_size

        with none_free(host.worker.pid), contextlib.ExitStack() as idle:
            for number in range(ADDRESSES):
                for _ in range(4):
                    source = (f"127.0.0.{2 + number}", 0)
                    idle.enter_context(
                        socket.create_connection(("127.0.0.1", port), 10, source_address=source)
                    )
            status, checks = await ready(port)
            refused = await host.run(STOP)

        assert (status, checks["has_descriptors"]) == (503, False)
        assert (checks["connected"], checks["can_commit"]) == (True, True)
        assert refused["code"] in {"ok", "exhausted"}, refused
        assert log.stat().st_size - size < MAX_LOG_BYTES
        async with asyncio.timeout(60):
            while not (await ready(port))[1]["has_descriptors"]:
                await asyncio.sleep(0.1)
        assert (await host.run(STOP))["code"] == "ok"
        assert (await host.run(START))["code"] == "ok"
        assert (await host.run(STOP))["code"] == "ok"
