"""VMMs outlive the worker; one that dies by itself is noticed, cleaned up and announced."""

import os
import signal
import time

import pytest

from handlers.host.vmm.processes import has_exited, open_pidfd
from schemas.requests import InstanceRef, SleepInstance, StartInstance
from tests.constants import DESTROY, NAMES, SLEEP, START, STOP, WAKE
from tests.crash.kills import (
    assert_one_outcome,
    events,
    kill_at,
    listening,
    stop_at,
    until,
    wait_event,
)
from tests.live_host import LiveHost, live_host
from worker.demo.guest import echo_through_tap

NOTICED_S = 1.0
OTHER = InstanceRef("acme", "web", "i-2")
OTHER_NAMES = (OTHER.tenant_id, OTHER.pool_id, OTHER.instance_id)


async def leftovers(host: LiveHost) -> dict[str, int]:
    """The inventory, but for the revisions: an instance at rest keeps its own (ADR 0003)."""
    return {kind: n for kind, n in (await host.inventory()).items() if kind != "artifacts"}


async def kill_vmm(host: LiveHost) -> None:
    """SIGKILL the instance's VMM, as an OOM killer would; returns once it is gone."""
    await end_vmm((await host.describe())["pid"])


async def end_vmm(pid: int) -> None:
    pidfd = open_pidfd(pid)
    assert pidfd is not None
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await until(lambda: has_exited(pidfd), "the end of the VMM")
    finally:
        os.close(pidfd)


async def crash_guest(host: LiveHost) -> None:
    """A triple fault, which ends the VMM with exit code 0; the guest does not answer it."""
    with pytest.raises(OSError, match=r"closed|reset|refused|file"):
        await host.crash_guest()


@pytest.mark.parametrize("kill", [kill_vmm, crash_guest])
@pytest.mark.parametrize("adopted", [False, True])
async def test_a_vmm_that_dies_is_noticed_within_a_second(kill: object, adopted: bool) -> None:
    async with live_host() as host, listening(host) as heard:
        seeded = host.seed()
        await host.net_up(seeded)
        before = await leftovers(host)
        assert (await host.run(START))["code"] == "ok"
        if adopted:
            await host.kill_worker()
            await host.start_worker()
            assert (await host.describe())["status"] == "running"

        started = time.monotonic()
        await (kill_vmm(host) if kill is kill_vmm else crash_guest(host))
        at, event = await heard.first("vmm_exited")

        assert at - started < NOTICED_S
        assert event["instance_id"] == NAMES[2]
        assert event["detail"]["launch"] == 1
        _, told = await heard.first("status")
        assert (told["from"], told["to"]) == ("running", "failed")
        assert (await host.describe())["status"] == "failed"
        assert await leftovers(host) == before
        assert (await host.run(START))["code"] == "ok"
        assert (await host.stat())["boots"] == 2
        assert await echo_through_tap(seeded.guest_ip, b"again") < 20
        assert len([e for e in await events(host) if e["kind"] == "vmm_exited"]) == 1


async def test_a_vm_runs_on_without_a_worker_and_is_adopted() -> None:
    async with live_host() as host:
        seeded = host.seed()
        await host.net_up(seeded)
        started = await host.run(START)
        first = await host.stat()
        root = await host.jail_root()

        await host.kill_worker()
        assert await echo_through_tap(seeded.guest_ip, b"nobody watches") < 20
        await host.start_worker()

        told = await host.describe()
        assert (told["status"], told["pid"]) == ("running", started["detail"]["pid"])
        recovered = await wait_event(host, lambda e: e.get("detail", {}).get("adopted") == 1)
        assert (recovered["kind"], recovered["detail"]["ended"]) == ("recovered", 0)
        assert await host.jail_root() == root
        assert await echo_through_tap(seeded.guest_ip, b"adopted") < 20
        later = await host.stat()
        assert (later["boots"], later["boot_id"]) == (1, first["boot_id"])
        assert later["counter"] > first["counter"]
        assert host.jailer_runs() == 1
        assert (await host.run(SLEEP))["code"] == "ok"
        assert (await host.run(WAKE))["code"] == "ok"
        assert (await host.run(STOP))["detail"]["method"] == "graceful"


async def test_a_vmm_that_died_while_the_worker_was_down_is_found_at_start() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        before = await leftovers(host)
        started = await host.run(START)

        await host.kill_worker()
        await end_vmm(started["detail"]["pid"])
        await host.start_worker()

        event = await wait_event(host, lambda e: e["kind"] == "vmm_exited")
        assert event["detail"]["launch"] == 1
        await host.wait_status("failed")
        assert await leftovers(host) == before
        assert (await host.run(DESTROY))["code"] == "ok"


async def test_a_killed_starts_booted_guest_is_adopted() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        await stop_at(host, "after:start_vm", START, "killed")
        booted = await host.describe()
        assert booted["status"] == "starting"

        await host.kill_worker()
        await host.start_worker()
        await host.result("killed")

        reply = await assert_one_outcome(host, "killed")
        assert (reply["code"], reply["detail"]["pid"]) == ("ok", booted["pid"])
        assert (await host.stat())["boots"] == 1
        assert host.jailer_runs() == 1


async def test_a_guest_that_may_have_booted_is_not_booted_again_under_the_same_id() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        before = await leftovers(host)
        await stop_at(host, "after:start_vm", START, "killed")
        pid = (await host.describe())["pid"]

        await host.kill_worker()
        await end_vmm(pid)
        await host.start_worker()
        await host.result("killed")

        reply = await assert_one_outcome(host, "killed")
        assert (reply["code"], reply["status"], reply["left_behind"]) == (
            "unavailable",
            "created",
            [],
        )
        assert host.jailer_runs() == 1
        assert await leftovers(host) == before
        assert (await host.run(START))["code"] == "ok"
        assert host.jailer_runs() == 2


async def test_a_wakes_vmm_that_dies_past_the_point_takes_the_snapshot_with_it() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        before = await leftovers(host)
        await host.run(START)
        await host.run(SLEEP)
        await stop_at(host, "after:consumed", WAKE, "killed")
        pid = (await host.describe())["pid"]

        await host.kill_worker()
        await end_vmm(pid)
        await host.start_worker()
        await host.result("killed")

        reply = await assert_one_outcome(host, "killed")
        assert (reply["code"], reply["status"]) == ("unavailable", "failed")
        assert await leftovers(host) == before
        assert (await host.run(WAKE))["code"] == "conflict"
        assert (await host.run(START))["code"] == "ok"


async def test_a_sleeps_vmm_that_dies_before_the_manifest_leaves_no_snapshot() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        before = await leftovers(host)
        await host.run(START)
        await stop_at(host, "after:snapshot_draft", SLEEP, "killed")
        pid = (await host.describe())["pid"]

        await host.kill_worker()
        await end_vmm(pid)
        await host.start_worker()
        await host.result("killed")

        reply = await assert_one_outcome(host, "killed")
        assert (reply["code"], reply["left_behind"]) == ("unavailable", [])
        await host.wait_status("failed")
        assert await leftovers(host) == before


async def test_a_published_snapshot_is_kept_though_its_vmm_died() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        await host.run(START)
        slept = await host.stat()
        await kill_at(host, "after:publish_snapshot", SLEEP, "killed")
        (pid,) = host.vm_pids()
        await end_vmm(pid)
        await host.start_worker()
        await host.result("killed")

        assert (await assert_one_outcome(host, "killed"))["code"] == "ok"
        assert (await host.run(WAKE))["code"] == "ok"
        woken = await host.stat()
        assert (woken["boots"], woken["boot_id"]) == (1, slept["boot_id"])


async def test_a_vmm_that_dies_in_its_drain_ends_the_drain() -> None:
    async with live_host() as host, listening(host) as heard:
        await host.net_up(host.seed())
        before = await leftovers(host)
        await host.run(START)
        await host.ask_guest({"Set": {"drain": "hold"}})
        pid = (await host.describe())["pid"]
        await host.publish(SleepInstance(*NAMES, force=False, drain_timeout_secs=600), "drained")
        await host.wait_status("draining")

        started = time.monotonic()
        await end_vmm(pid)
        at, _ = await heard.first("vmm_exited")

        assert at - started < NOTICED_S
        assert (await host.result("drained"))["code"] == "unavailable"
        await host.wait_status("failed")
        assert await leftovers(host) == before


async def test_a_vm_that_hangs_holds_up_no_restart() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        host.seed(OTHER)
        await host.run(START)
        (pid,) = host.vm_pids()
        await host.kill_worker()

        os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            await host.start_worker()
            other = await host.run(StartInstance(*OTHER_NAMES))
            took_s = time.monotonic() - started
        finally:
            os.kill(pid, signal.SIGCONT)

        assert other["code"] == "ok"
        assert took_s < 10
        assert (await host.describe())["pid"] == pid
        assert (await host.stat())["boots"] == 1
