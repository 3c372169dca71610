"""SIGTERM in the midst of work: in order, within its budget; VMs go on, the next worker ends it."""

from schemas.requests import SleepInstance
from tests.constants import NAMES, REF, START, STOP
from tests.crash.kills import assert_one_outcome, stop_at, until
from tests.live_host import LiveHost, live_host
from worker.demo.guest import echo_through_tap

LONG_SLEEP = SleepInstance(*NAMES, force=False, drain_timeout_secs=600)


async def stop_worker(host: LiveHost) -> None:
    """SIGTERM; exit 0, with its last word in the log. A worker that hangs is a TimeoutError."""
    before = host.log().count("worker.stopped")
    assert await host.stop_worker() == 0
    assert host.log().count("worker.stopped") == before + 1


async def test_a_drain_is_cut_at_once_and_done_by_the_next_worker() -> None:
    async with live_host(shutdown_s=300.0) as host:
        seeded = host.seed()
        await host.net_up(seeded)
        await host.run(START)
        root = await host.jail_root()
        await host.ask_guest({"Set": {"drain": "hold"}})
        await host.publish(LONG_SLEEP, "cut")
        await host.wait_status("draining")

        await stop_worker(host)  # waits neither for the drain nor for the budget

        assert await echo_through_tap(seeded.guest_ip, b"runs on") < 20
        assert await host.replies("cut") == []
        await host.ask_jail(root, {"Set": {"drain": "ok"}})
        await host.start_worker()
        await host.result("cut")
        reply = await assert_one_outcome(host, "cut")
        assert (reply["code"], reply["status"], reply["attempts"]) == ("ok", "sleeping", 2)
        assert reply["detail"]["drain"] == "acknowledged"


async def test_what_does_not_stop_in_its_budget_is_cut_and_goes_on_with_the_next_worker() -> None:
    async with live_host(shutdown_s=1.0) as host:
        await host.net_up(host.seed())
        await stop_at(host, "after:start_vm", START, "stuck")
        pid = (await host.describe())["pid"]

        await stop_worker(host)

        assert host.vm_pids() == [pid]
        await host.start_worker()
        await host.result("stuck")
        reply = await assert_one_outcome(host, "stuck")
        assert (reply["code"], reply["detail"]["pid"]) == ("ok", pid)
        assert (await host.stat())["boots"] == 1
        assert host.jailer_runs() == 1


async def test_commands_that_wait_are_kept_and_each_is_answered_once() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        await host.run(START)
        root = await host.jail_root()
        await host.ask_guest({"Set": {"drain": "hold"}})
        await host.publish(LONG_SLEEP, "first")
        await host.wait_status("draining")
        waiting = [f"wait-{n}" for n in range(20)]
        for name in waiting:
            await host.publish(START, name)
        await host.wait_unfinished(21)

        await stop_worker(host)  # waits neither for the drain nor for the budget

        await host.ask_jail(root, {"Set": {"drain": "ok"}})
        await host.start_worker()
        assert (await host.result("first"))["code"] == "ok"
        for name in waiting:
            assert (await host.result(name))["code"] == "conflict"
            assert len(await host.replies(name)) == 1
        assert (await host.describe())["status"] == "sleeping"


async def test_a_worker_without_its_bus_stops_in_order_too() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        await host.run(START)
        (pid,) = host.vm_pids()
        await host.nats.stop()
        await until(lambda: "bus.disconnected" in host.log(), "the loss of the bus")

        await stop_worker(host)  # waits neither for the drain nor for the budget

        assert host.vm_pids() == [pid]
        await host.nats.start()
        await host.start_worker()
        assert (await host.describe(REF))["pid"] == pid
        assert (await host.run(STOP))["code"] == "ok"
