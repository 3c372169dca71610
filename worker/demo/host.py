"""The demo's host: a worker process with settings of its own, and how it goes again."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import click
import msgspec

from handlers.host.vmm.cgroups import CONTROLLERS, find_mount
from schemas.requests import Ping
from schemas.settings import (
    HostSettings,
    LimitSettings,
    MetricsSettings,
    NatsSettings,
    PathSettings,
    Settings,
    VmmSettings,
)
from schemas.subjects import Subjects
from worker.bus.connection import Connection
from worker.bus.provision import provision
from worker.cli.client import Client
from worker.cli.context import CliError
from worker.demo.cleanup import remove_host
from worker.demo.progress import DemoFailed


def demo_settings(directory: str, url: str, build: str) -> Settings:
    """All paths in one directory; limits in force where the machine has the controllers."""
    with open(f"{find_mount()}/cgroup.controllers") as file:
        controllers = file.read().split()
    return Settings(
        host=HostSettings(id=f"demo-{os.getpid()}", cell="demo", production=False),
        nats=NatsSettings(url=url),
        paths=PathSettings(
            data=f"{directory}/mvm", state=f"{directory}/state", run=f"{directory}/run"
        ),
        vmm=VmmSettings(firecracker=f"{build}/bin/firecracker", jailer=f"{build}/bin/jailer"),
        metrics=MetricsSettings(listen=""),
        limits=LimitSettings(
            enforce=set(CONTROLLERS) <= set(controllers), cgroup=f"hostd-demo-{os.getpid()}"
        ),
    )


async def provision_cell(settings: Settings, subjects: Subjects) -> None:
    connection = Connection(settings.nats, name="hostd-demo", inbox="_INBOX.hostd-demo")
    await connection.start()
    try:
        await connection.wait_connected()
        await provision(connection, subjects, [settings.host.id])
    finally:
        await connection.close()


@asynccontextmanager
async def worker_process(settings: Settings, directory: str) -> AsyncGenerator[None]:
    """`hostd run` as its own process; ended by SIGTERM, its log shown if it fails."""
    environment = os.environ | environment_of(settings)
    log_path = f"{directory}/hostd.log"
    with open(log_path, "wb") as log:  # noqa: ASYNC230 (the demo waits for nothing else)
        # Not the working directory's `worker` directory; PYTHONPATH counts, the lab has it.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "worker", stdout=log, stderr=log, env=environment
        )
    try:
        yield
    except Exception:
        with open(log_path) as log_file:  # noqa: ASYNC230
            click.echo(log_file.read()[-8000:], err=True)
        raise
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise DemoFailed(f"the worker ended with {process.returncode}")


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, `HOSTD_<TABLE>_<KEY>`."""
    names: dict[str, str] = {}
    for table, values in msgspec.to_builtins(settings).items():
        for key, value in values.items():
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            names[f"HOSTD_{table}_{key}".upper()] = text
    return names


async def first_ping(client: Client, settings: Settings) -> list[str]:
    """Wait until the worker takes commands; what it says of itself."""
    async with asyncio.timeout(60):
        while True:
            with suppress(CliError):
                if (await client.ask(settings.host.id, "ping"))["host_state"] == "ready":
                    break
            await asyncio.sleep(0.1)
    detail = (await client.send(settings.host.id, Ping(), timeout_s=10))["detail"]
    limits = "in force" if detail["limits_enforced"] else "off, no cgroup v2 controllers here"
    return [f"hostd {detail['version']}", f"limits {limits}"]


async def leave_nothing(settings: Settings, directory: str) -> None:
    """After a good end only files are left to remove, after a bad one perhaps a VM."""
    for line in await asyncio.to_thread(remove_host, settings, directory):
        click.echo(f"left behind: {line}", err=True)
