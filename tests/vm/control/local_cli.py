"""The command line in this process, with the settings of a live host."""

import asyncio

from click.testing import CliRunner, Result

from tests.live_host import LiveHost
from worker.cli.main import main
from worker.demo.host import environment_of


async def hostd(host: LiveHost, *args: str) -> Result:
    """In a thread, so that the host's event loop, the test's, goes on."""
    setting = {"HOSTD_CONFIG": None, **environment_of(host.settings)}
    return await asyncio.to_thread(CliRunner().invoke, main, args, env=setting)
