"""A worker whose journal hangs in the kernel is no longer alive to systemd; its VMs do not notice.

The test is the service manager: it binds the socket, and sends the signals that systemd would.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.constants import START, STOP
from tests.live_host import LiveHost, live_host

LIMIT_S = 3
PATIENCE_S = 60


class Manager:
    """What the worker told, in order, and when systemd would give it up."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    async def until(self, line: str) -> list[str]:
        """The lines up to this one."""
        told: list[str] = []
        async with asyncio.timeout(PATIENCE_S):
            while not told or told[-1] != line:
                data = await asyncio.get_running_loop().sock_recv(self._listener, 4096)
                told.append(data.decode())
        return told

    async def expired(self) -> None:
        """Return once no sign of life has come for the watchdog's time."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(LIMIT_S):
                        await loop.sock_recv(self._listener, 4096)


def mount_disk_that_freezes(host: LiveHost) -> Path:
    """A file system of its own for journal, jails and data; removed with the host's directory."""
    image, point = Path(host.directory, "disk.img"), Path(host.directory, "disk")
    with image.open("wb") as file:
        file.truncate(1 << 30)
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mount = subprocess.run(["mount", "-o", "loop", image, point], check=False, capture_output=True)
    if mount.returncode:
        assert not os.environ.get("CI"), mount.stderr
        pytest.skip(f"this kernel mounts no file system from a loop device: {mount.stderr!r}")
    return point


@contextlib.contextmanager
def frozen(point: Path) -> Generator[None]:
    """Every write to it sleeps in the kernel, and no signal ends that."""
    subprocess.run(["fsfreeze", "-f", point], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", point], check=True)


@contextlib.contextmanager
def managed(host: LiveHost) -> Generator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.setblocking(False)
        listener.bind(f"{host.directory}/notify")
        yield Manager(listener)


async def start_worker(host: LiveHost) -> None:
    variables = {
        "NOTIFY_SOCKET": f"{host.directory}/notify",
        "WATCHDOG_USEC": str(LIMIT_S * 1_000_000),
    }
    await host.start_worker(environment=variables)


async def start_vm(host: LiveHost) -> int:
    """Returns how often its guest has booted."""
    await host.net_up(host.seed())
    assert (await host.run(START))["code"] == "ok"
    return int((await host.stat())["boots"])


async def test_a_worker_that_hangs_in_the_kernel_is_started_again_and_no_vm_notices() -> None:
    async with live_host(worker=False) as host:
        point = mount_disk_that_freezes(host)
        with managed(host) as manager:
            await start_worker(host)
            assert await manager.until("READY=1") == ["READY=1"]
            await manager.until("WATCHDOG=1")
            boots, pids = await start_vm(host), host.vm_pids()
            assert host.worker is not None

            with frozen(point):
                await host.publish(START, "while-frozen")
                await manager.expired()
                host.worker.send_signal(signal.SIGABRT)  # takes effect once it can
            code = await asyncio.wait_for(host.worker.wait(), PATIENCE_S)

            assert code == -signal.SIGABRT
            log = host.log()
            assert "Fatal Python error: Aborted" in log
            assert "journal/writer.py" in log  # the stacks of all threads
            await start_worker(host)
            await manager.until("WATCHDOG=1")
            assert host.vm_pids() == pids
            assert (await host.stat())["boots"] == boots
            assert (await host.run(STOP))["code"] == "ok"
            assert await host.stop_worker() == 0
            assert "STOPPING=1" in await manager.until("STOPPING=1")
