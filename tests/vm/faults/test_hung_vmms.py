"""A VMM that hangs, on a whole host: announced, or killed by policy; and what is no hang."""

import contextlib
import os
import signal
from collections.abc import AsyncGenerator

from tests.constants import SLEEP, START, STOP, WAKE
from tests.crash.kills import events, listening, wait_event
from tests.live_host import LiveHost, live_host


@contextlib.asynccontextmanager
async def probing_host(on_hang: str = "report") -> AsyncGenerator[LiveHost]:
    """A host with one running VM, which is asked every second."""
    async with live_host(worker=False) as host:
        await host.start_worker(
            environment={"HOSTD_VMM_PROBE_INTERVAL_S": "1", "HOSTD_VMM_ON_HANG": on_hang}
        )
        await host.net_up(host.seed())
        assert (await host.run(START))["code"] == "ok"
        yield host


async def test_a_stopped_vmm_is_announced_and_so_is_that_it_answers_again() -> None:
    async with probing_host() as host:
        (pid,) = host.vm_pids()
        before = await host.stat()

        os.kill(pid, signal.SIGSTOP)
        try:
            event = await wait_event(host, lambda e: e["kind"] == "vmm_hung")
            described = await host.describe()
        finally:
            os.kill(pid, signal.SIGCONT)

        assert (event["detail"]["hung"], event["detail"]["pid"]) == (True, pid)
        assert (described["status"], described["hung_since_ms"] is None) == ("running", False)
        again = await wait_event(
            host, lambda e: e["kind"] == "vmm_hung" and not e["detail"]["hung"]
        )
        assert again["detail"]["launch"] == 1
        assert (await host.describe())["hung_since_ms"] is None
        after = await host.stat()
        assert (after["boots"], after["boot_id"]) == (1, before["boot_id"])


async def test_a_vmm_that_hangs_is_killed_where_the_policy_says_so() -> None:
    async with probing_host("kill") as host, listening(host) as heard:
        (pid,) = host.vm_pids()

        os.kill(pid, signal.SIGSTOP)
        _, ended = await heard.first("vmm_exited")

        assert (ended["detail"]["reason"], ended["detail"]["signal"]) == ("hung", signal.SIGKILL)
        await host.wait_status("failed")
        assert (await host.describe())["last_end"]["reason"] == "hung"
        assert host.vm_pids() == []
        assert (await host.run(START))["code"] == "ok"
        assert (await host.describe())["hung_since_ms"] is None


async def test_a_vmm_that_hangs_can_be_stopped() -> None:
    async with probing_host() as host:
        (pid,) = host.vm_pids()
        os.kill(pid, signal.SIGSTOP)
        await wait_event(host, lambda e: e["kind"] == "vmm_hung")

        stopped = await host.run(STOP)

        assert (stopped["code"], stopped["detail"]["method"]) == ("ok", "sigkill")


async def test_commands_are_neither_held_up_by_probes_nor_taken_for_a_hang() -> None:
    async with probing_host("kill") as host:
        for command in (SLEEP, WAKE) * 4:
            reply = await host.run(command)
            assert (reply["code"], reply["attempts"]) == ("ok", 1)

        assert [e for e in await events(host) if e["kind"] in ("vmm_hung", "vmm_exited")] == []
        assert (await host.stat())["boots"] == 1
