"""A worker whose stdout takes nothing serves every command, and ends in order."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.constants import START, STOP
from tests.live_host import live_host
from tests.unit.process.test_log_writer import closed_pipe, full_disk, full_pipe


@pytest.mark.parametrize("stdout", [closed_pipe, full_pipe, full_disk])
async def test_a_worker_without_a_log_runs_commands(stdout: Callable[[], Any]) -> None:
    with stdout() as fd:
        async with live_host() as host:
            await host.net_up(host.seed())
            await host.stop_worker()
            await host.start_worker(stdout=fd, environment={"HOSTD_LOG_LEVEL": "debug"})

            assert (await host.run(START))["code"] == "ok"
            assert (await host.run(STOP))["code"] == "ok"
            assert await host.stop_worker() == 0
