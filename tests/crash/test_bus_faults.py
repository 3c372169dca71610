"""The bus goes away, or is not there yet: work goes on, nothing is lost or doubled, it heals."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import json
import time
from typing import Any

import pytest

from schemas.requests import Request, SleepInstance
from tests.constants import NAMES, SLEEP, START, STOP, WAKE
from tests.crash.kills import assert_one_outcome, until
from tests.live_host import LiveHost, live_host
from worker.demo.host import provision_cell

HELD = SleepInstance(*NAMES, force=False, drain_timeout_secs=600)
HEALED_S = 10.0


def logged(host: LiveHost, event: str) -> list[dict[str, Any]]:
    """The worker's log lines of one event."""
    lines = [json.loads(line) for line in host.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


async def lose_server(host: LiveHost, how: str) -> None:
    """Orderly, or as kill -9 would."""
    if how == "stop":
        await host.nats.stop()
    else:
        await asyncio.to_thread(host.nats.process.kill)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_commands_that_run_while_the_server_is_away_end_and_are_told_afterwards(
    how: str,
) -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        await host.run(START)
        root = await host.jail_root()
        await host.ask_guest({"Set": {"drain": "hold"}})
        await host.publish(HELD, "cut-off")
        await host.wait_status("draining")

        await lose_server(host, how)
        await until(lambda: bool(logged(host, "bus.disconnected")), "the loss of the bus")
        await host.ask_jail(root, "Release")
        await until(lambda: not host.vm_pids(), "the end of the VMM")
        await host.nats.start()
        back = time.monotonic()
        await host.wait_ready()
        await host.result("cut-off")

        assert time.monotonic() - back < HEALED_S
        reply = await assert_one_outcome(host, "cut-off")
        assert (reply["code"], reply["status"], reply["attempts"]) == ("ok", "sleeping", 1)
        assert reply["detail"]["drain"] == "acknowledged"
        assert (await host.run(WAKE))["code"] == "ok"
        assert (await host.stat())["boots"] == 1
        assert host.jailer_runs() == 2


async def test_a_server_that_comes_and_goes_loses_and_doubles_no_command() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        life: list[tuple[str, Request]] = [
            ("start", START),
            ("sleep", SLEEP),
            ("wake", WAKE),
            ("stop", STOP),
        ]

        for name, request in life:
            await host.publish(request, name)
            await lose_server(host, "kill")
            await host.nats.start()
            await host.wait_ready()
            await host.result(name)

        for name, _ in life:
            reply = await assert_one_outcome(host, name)
            assert (reply["code"], reply["changed"]) == ("ok", True)
        assert host.jailer_runs() == 2
        assert host.vm_pids() == []


async def test_a_worker_started_before_its_server_goes_on_by_itself() -> None:
    async with live_host(worker=False) as host:
        await host.nats.stop()
        await host.start_worker(ready=False)
        await until(lambda: bool(logged(host, "bus.connect_failed")), "a word about the bus")
        await until(lambda: bool(logged(host, "worker.ready")), "the worker")

        await host.nats.start()
        back = time.monotonic()

        assert (await host.net_up(host.seed()))["code"] == "ok"
        assert time.monotonic() - back < HEALED_S
        assert logged(host, "bus.connect_failed")[0]["url"] == host.nats.url


def names_of(host: LiveHost, what: str) -> tuple[str, str | None]:
    """Stream and consumer, which is None for the stream itself."""
    subjects = host.subjects
    if what == "consumer":
        return subjects.commands_stream, subjects.consumer
    if what == "bucket":
        return f"KV_{subjects.state_bucket}", None
    return str(getattr(subjects, f"{what}_stream")), None


async def remove(host: LiveHost, what: str) -> str:
    """Take one object of the cell away; returns its name."""
    stream, consumer = names_of(host, what)
    async with host.client() as client:
        context = client.nats.jetstream()
        if consumer is None:
            await context.delete_stream(stream)
        else:
            await context.delete_consumer(stream, consumer)
    return consumer or stream


def complaint(host: LiveHost) -> str:
    """What the worker says is not provisioned."""
    told = logged(host, "bus.not_provisioned")
    return str(told[-1]["problem"]) if told else ""


OBJECTS = ["commands", "consumer", "replies", "events", "dead", "bucket"]


@pytest.mark.parametrize("what", OBJECTS)
async def test_what_is_missing_at_start_is_named_and_waited_for(what: str) -> None:
    async with live_host(worker=False) as host:
        name = await remove(host, what)
        await host.start_worker(ready=False)
        await until(lambda: name in complaint(host), f"a word about {name}")

        assert "hostd provision" in complaint(host)
        assert "missing" in complaint(host)
        await provision_cell(host.settings, host.subjects)
        back = time.monotonic()
        assert (await host.net_up(host.seed()))["code"] == "ok"
        assert time.monotonic() - back < HEALED_S
        assert logged(host, "bus.provisioned")


@pytest.mark.parametrize("what", ["commands", "consumer"])
async def test_what_is_taken_away_under_the_worker_is_named_and_waited_for(what: str) -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        name = await remove(host, what)
        await until(lambda: name in complaint(host), f"a word about {name}")

        assert "hostd provision" in complaint(host)
        await provision_cell(host.settings, host.subjects)
        back = time.monotonic()
        assert (await host.run(START))["code"] == "ok"
        assert time.monotonic() - back < HEALED_S


async def test_replies_wait_for_a_stream_that_was_taken_away() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        await host.run(START)
        root = await host.jail_root()
        await host.ask_guest({"Set": {"drain": "hold"}})
        await host.publish(HELD, "told")
        await host.wait_status("draining")
        # From now on no command is taken in, but the one that runs goes on and has an outcome.
        name = await remove(host, "replies")
        await until(lambda: name in complaint(host), f"a word about {name}")
        await host.ask_jail(root, "Release")
        await until(lambda: bool(logged(host, "outbox.send_failed")), "a word about the reply")

        await until(
            lambda: any(
                "hostd provision" in line["error"] for line in logged(host, "outbox.send_failed")
            ),
            f"what to provision for {name}",
        )
        await provision_cell(host.settings, host.subjects)
        async with asyncio.timeout(HEALED_S):
            while not await host.replies("told"):
                await asyncio.sleep(0.02)

        assert len(await host.replies("told")) == 1
