"""What a guest lives through: sleep and wake, drains good and bad, the methods of Stop, Destroy."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from tests.guests import agent
from tests.live_host import LiveHost, live_host
from tests.vm.control.local_cli import hostd
from tests.vm.whole_host import traffic
from tests.vm.whole_host.shared_host import events, ref_of
from worker.cli.seed import Seeded

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRETS = b'{"token": "only the guest may see this"}'


@dataclass(frozen=True)
class Alive:
    """A started instance, and the commands about it."""

    host: LiveHost
    ref: InstanceRef
    seeded: Seeded
    started: dict[str, Any]

    @property
    def names(self) -> tuple[str, str, str]:
        return (self.ref.tenant_id, self.ref.pool_id, self.ref.instance_id)

    @property
    def pool(self) -> Path:
        data = Path(self.host.settings.paths.data)
        return data / "tenants" / self.ref.tenant_id / "pools" / self.ref.pool_id

    @property
    def disk(self) -> Path:
        return self.pool / "instances" / self.ref.instance_id / "volumes" / "data.ext4"

    async def start(self) -> dict[str, Any]:
        return await self.host.run(StartInstance(*self.names))

    async def stop(self) -> dict[str, Any]:
        return await self.host.run(StopInstance(*self.names))

    async def sleep(self, *, force: bool = False, timeout_s: int | None = None) -> dict[str, Any]:
        request = SleepInstance(*self.names, force=force, drain_timeout_secs=timeout_s)
        return await self.host.run(request)

    async def wake(self) -> dict[str, Any]:
        return await self.host.run(WakeInstance(*self.names))

    async def destroy(self, *, wipe: bool = True) -> dict[str, Any]:
        return await self.host.run(DestroyInstance(*self.names, wipe_volumes=wipe))

    async def stat(self) -> dict[str, Any]:
        return await self.host.stat(self.ref)

    async def tell(self, **modes: str) -> None:
        """Have the guest behave like that from now on."""
        assert await self.host.ask_guest({"Set": modes}, self.ref) == "Ok"

    async def drives(self) -> dict[str, int]:
        answer = await self.host.ask_guest("Drives", self.ref)
        return {drive["label"]: drive["size_bytes"] for drive in answer["Drives"]}

    async def events(self, kind: str) -> list[dict[str, Any]]:
        told = await events(self.host)
        name = self.ref.instance_id
        return [e for e in told if e.get("instance_id") == name and e["kind"] == kind]

    def set_policy(self, **seconds: int) -> None:
        file = self.pool / "pool.json"
        content = json.loads(file.read_bytes())
        content["runtime_policy"] = seconds
        file.write_text(json.dumps(content))


def step_s(reply: dict[str, Any], name: str) -> float:
    """How long a step of the command took."""
    return sum(float(step["took_us"]) for step in reply["steps"] if step["name"] == name) / 1e6


@pytest_asyncio.fixture(loop_scope="module")
async def alive(host: LiveHost, request: pytest.FixtureRequest) -> AsyncIterator[Alive]:
    """A running instance with a data disk and secrets; afterwards the host is as it was."""
    ref = ref_of("alive")
    before = await host.inventory()
    seeded = host.seed(ref, offset=5, mem_mib=32, secrets=SECRETS)
    assert (await host.net_up(seeded))["code"] == "ok"
    started = await host.run(StartInstance(ref.tenant_id, ref.pool_id, ref.instance_id))
    assert started["code"] == "ok", started
    alive = Alive(host, ref, seeded, started)
    yield alive
    assert (await alive.destroy())["code"] == "ok"
    assert (await host.net_down(seeded.net))["code"] == "ok"
    assert await host.inventory() == before


# -- sleep and wake --------------------------------------------------------------------------------


async def test_a_guest_goes_on_after_a_wake_where_it_was(alive: Alive) -> None:
    address = alive.seeded.guest_ip
    assert traffic.flows(address)
    with traffic.tcp_connect(address) as stream:
        assert traffic.tcp_echo(stream, b"before") == b"before"
        first, awake, drives = await alive.host.describe(alive.ref), await alive.stat(), None
        drives = await alive.drives()

        slept = await alive.sleep()
        woken_reply = await alive.wake()

        assert slept["detail"]["drain"] == "acknowledged"
        second, woken = await alive.host.describe(alive.ref), await alive.stat()
        assert woken["counter"] > awake["counter"]
        assert woken["boot_id"] == awake["boot_id"]
        assert (woken["boots"], woken["drains"], woken["wakes"]) == (1, 1, 1)
        assert not woken["asleep"]
        assert second["launch"] == first["launch"] + 1
        assert woken_reply["detail"]["launch"] == second["launch"]
        assert woken_reply["detail"]["pid"] != alive.started["detail"]["pid"]
        assert "clock_was_off_s" in woken_reply["detail"]
        assert traffic.flows(address)
        assert traffic.tcp_echo(stream, b"the same connection") == b"the same connection"
    assert await alive.drives() == drives
    assert {"mvm-config", "mvm-data", "mvm-secrets"} <= drives.keys()


async def test_a_guest_may_sleep_and_wake_over_and_over(alive: Alive) -> None:
    counters = [(await alive.stat())["counter"]]
    for _ in range(5):
        assert (await alive.sleep())["code"] == "ok"
        assert (await alive.wake())["code"] == "ok"
        counters.append((await alive.stat())["counter"])

    assert counters == sorted(set(counters))
    assert (await alive.stat())["wakes"] == 5
    assert (await alive.host.inventory())["snapshots"] == 0


async def test_what_is_asleep_or_awake_already_is_not_changed(alive: Alive) -> None:
    again = await alive.start()
    assert (again["code"], again["changed"], again["status"]) == ("ok", False, "running")
    again = await alive.wake()
    assert (again["code"], again["changed"], again["status"]) == ("ok", False, "running")
    await alive.sleep()
    again = await alive.sleep()
    assert (again["code"], again["changed"], again["status"]) == ("ok", False, "sleeping")
    assert (await alive.start())["code"] == "conflict"
    await alive.wake()
    assert (await alive.stat())["boots"] == 1


# -- drains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "drain"),
    [
        ({"drain": "refuse"}, "refused"),
        ({"drain": "silent"}, "no_answer"),
        ({"agent": "deaf"}, "no_answer"),
        ({"drain": "hold"}, "no_answer"),
    ],
    ids=["refused", "silent", "deaf", "held"],
)
async def test_a_guest_that_does_not_drain_sleeps_and_wakes_all_the_same(
    alive: Alive, modes: dict[str, str], drain: str
) -> None:
    awake, drives = await alive.stat(), await alive.drives()
    await alive.tell(**modes)

    slept = await alive.sleep(timeout_s=0)
    woken = await alive.wake()

    assert (slept["code"], slept["status"]) == ("ok", "sleeping"), slept
    assert slept["detail"]["drain"] == drain
    assert slept["detail"].get("drain_reason") == ("told to refuse" if drain == "refused" else None)
    [told] = [e for e in await alive.events("snapshot") if e.get("command_id") == slept["id"]]
    assert told["detail"]["drain"] == drain
    assert (woken["code"], woken["status"]) == ("ok", "running"), woken
    assert ("agent_failed" in woken["detail"]) == ("agent" in modes)
    assert traffic.flows(alive.seeded.guest_ip)
    if "agent" not in modes:
        assert (await alive.stat())["boot_id"] == awake["boot_id"]
        assert await alive.drives() == drives


async def test_a_drain_may_take_its_time(alive: Alive) -> None:
    await alive.tell(drain="slow:300")

    slept = await alive.sleep(timeout_s=10)

    assert slept["detail"]["drain"] == "acknowledged"
    assert 0.2 < step_s(slept, "drain_guest") < 5
    await alive.wake()


async def test_the_drain_ends_with_its_time_and_the_pools_is_the_default(alive: Alive) -> None:
    await alive.tell(drain="silent")
    asked = await alive.sleep(timeout_s=1)
    await alive.wake()
    alive.set_policy(drain_timeout_seconds=0)
    default = await alive.sleep()
    await alive.wake()

    assert asked["detail"]["drain"] == default["detail"]["drain"] == "no_answer"
    assert 1 <= step_s(asked, "drain_guest") < 4
    assert step_s(default, "drain_guest") < 3 < 1 + step_s(asked, "drain_guest")


async def test_a_forced_sleep_asks_nobody(alive: Alive) -> None:
    await alive.tell(drain="hold")

    slept = await alive.sleep(force=True)

    assert slept["detail"]["drain"] == "forced"
    await alive.wake()
    assert (await alive.stat())["drains"] == 0


@pytest.mark.parametrize("by", ["StopInstance", "DestroyInstance"])
async def test_stop_and_destroy_end_a_drain_that_is_held(alive: Alive, by: str) -> None:
    await alive.tell(drain="hold")
    request = SleepInstance(*alive.names, force=False, drain_timeout_secs=60)
    sleep_id = f"held-{by}"
    await alive.host.publish(request, sleep_id)
    await alive.host.wait_status("draining", alive.ref)

    async with asyncio.timeout(20):
        won = await (alive.stop() if by == "StopInstance" else alive.destroy())

    lost = await alive.host.result(sleep_id)
    assert (won["code"], won["changed"]) == ("ok", True)
    assert lost["code"] == "superseded", lost
    assert lost["detail"]["by"] == won["id"]
    assert lost["finished_at_ms"] <= won["finished_at_ms"]
    assert (await alive.host.inventory())["snapshots"] == 0


async def test_a_forced_sleep_ends_a_drain_that_is_held(alive: Alive) -> None:
    await alive.tell(drain="hold")
    request = SleepInstance(*alive.names, force=False, drain_timeout_secs=60)
    await alive.host.publish(request, "held-force")
    await alive.host.wait_status("draining", alive.ref)

    async with asyncio.timeout(20):
        second = await alive.sleep(force=True)

    first = await alive.host.result("held-force")
    assert (first["code"], first["changed"], first["detail"]["drain"]) == ("ok", True, "forced")
    assert "force" in first["detail"]["drain_reason"]
    assert (second["code"], second["changed"], second["status"]) == ("ok", False, "sleeping")
    assert (await alive.wake())["code"] == "ok"
    assert (await alive.stat())["boots"] == 1


async def test_a_wake_that_the_agent_does_not_take_goes_on_and_says_so(alive: Alive) -> None:
    await alive.tell(wake="refuse")
    await alive.sleep()

    woken = await alive.wake()

    assert (woken["code"], woken["status"]) == ("ok", "running")
    assert woken["detail"]["agent_failed"]
    assert any("agent_failed" in e.get("detail", {}) for e in await alive.events("snapshot"))
    assert traffic.flows(alive.seeded.guest_ip)


# -- stop ------------------------------------------------------------------------------------------


async def test_stop_asks_the_guest_first(alive: Alive) -> None:
    stopped = await alive.stop()

    assert (stopped["status"], stopped["detail"]["method"]) == ("stopped", "graceful")
    assert step_s(stopped, "stop_vmm") < 5
    again = await alive.stop()
    assert (again["code"], again["changed"], again["status"]) == ("ok", False, "stopped")


@pytest.mark.parametrize("mode", ["cad off", "hang"])
async def test_a_guest_that_does_not_end_is_killed_in_its_time(alive: Alive, mode: str) -> None:
    alive.set_policy(graceful_shutdown_seconds=1)
    if mode == "hang":
        uds = Path(await alive.host.jail_root(alive.ref), "v.sock")
        await asyncio.to_thread(ask_without_answer, uds, "Hang")
    else:
        await alive.tell(cad="off")

    stopped = await alive.stop()

    assert (stopped["code"], stopped["detail"]["method"]) == ("ok", "sigkill")
    assert 0.5 < step_s(stopped, "stop_vmm") < 3
    assert (await alive.start())["code"] == "ok"
    assert (await alive.stat())["boots"] == 2


async def test_a_destroy_ends_the_grace_period_of_a_stop(alive: Alive) -> None:
    alive.set_policy(graceful_shutdown_seconds=60)
    await alive.tell(cad="off")
    await alive.host.publish(StopInstance(*alive.names), "patient")
    await alive.host.wait_status("stopping", alive.ref)

    async with asyncio.timeout(20):
        destroyed = await alive.destroy()

    stopped = await alive.host.result("patient")
    assert (stopped["code"], stopped["detail"]["method"]) == ("ok", "sigkill")
    assert (destroyed["code"], destroyed["status"]) == ("ok", "destroyed")


async def test_stop_discards_what_sleeps(alive: Alive) -> None:
    await alive.sleep()

    stopped = await alive.stop()

    assert (stopped["code"], stopped["status"]) == ("ok", "stopped")
    assert (await alive.host.inventory())["snapshots"] == 0
    assert (await alive.wake())["code"] == "conflict"
    assert (await alive.start())["code"] == "ok"
    assert (await alive.stat())["boots"] == 2


@pytest.mark.parametrize("how", ["Crash", "Reset"])
async def test_a_vmm_that_ends_by_itself_is_cleaned_up_and_announced(
    alive: Alive, how: str
) -> None:
    uds = Path(await alive.host.jail_root(alive.ref), "v.sock")

    await asyncio.to_thread(ask_without_answer, uds, how)
    await alive.host.wait_status("failed", alive.ref, timeout_s=10)

    exited = [event["detail"]["launch"] for event in await alive.events("vmm_exited")]
    assert exited.count(alive.started["detail"]["launch"]) == 1
    actions = json.loads((await hostd(alive.host, "audit", "--json")).stdout)["actions"]
    launch = f'"launch":{alive.started["detail"]["launch"]}'
    (row,) = [row for row in actions if row["kind"] == "vmm_exited" and launch in row["reason"]]
    assert (row["actor"], row["tenant_id"]) == ("worker", alive.ref.tenant_id)
    now = await alive.host.inventory()
    assert not any(now[kind] for kind in ("processes", "taps", "jails", "sockets", "cgroups"))
    assert (await alive.start())["code"] == "ok"
    assert (await alive.stat())["boots"] == 2


# -- destroy ---------------------------------------------------------------------------------------


async def test_kept_volumes_come_back_with_a_new_file(alive: Alive) -> None:
    kept = await alive.destroy(wipe=False)
    assert (kept["status"], kept["detail"]["volumes"]) == ("destroyed", "kept")
    assert alive.disk.exists()
    assert not (alive.disk.parents[1] / "instance.json").exists()
    assert (await alive.start())["code"] == "not_found"

    alive.host.seed(alive.ref, offset=5, mem_mib=32)
    again = await alive.start()

    assert again["code"] == "ok", again
    assert again["detail"]["launch"] > alive.started["detail"]["launch"]
    assert (await alive.stat())["boots"] == 2


async def test_a_later_destroy_wipes_what_an_earlier_one_kept(alive: Alive) -> None:
    await alive.destroy(wipe=False)
    assert alive.disk.exists()

    wiped = await alive.destroy(wipe=True)

    assert (wiped["code"], wiped["changed"]) == ("ok", True)
    assert not alive.disk.exists()
    assert not alive.disk.parents[1].exists()
    again = await alive.destroy(wipe=True)
    assert (again["code"], again["changed"], again["status"]) == ("ok", False, "destroyed")


async def test_destroy_works_when_the_file_is_gone_and_while_it_sleeps(alive: Alive) -> None:
    await alive.sleep()
    (alive.disk.parents[1] / "instance.json").unlink()

    gone = await alive.destroy()

    assert (gone["code"], gone["changed"], gone["detail"]["volumes"]) == ("ok", True, "wiped")
    assert not alive.disk.exists()


# -- a guest without an agent ----------------------------------------------------------------------


async def test_without_an_agent_a_start_is_undone_unless_the_pool_says_api() -> None:
    async with live_host(worker=False, boot_args="mini.agent=off", retry_budget_s=0.1) as host:
        await host.start_worker(environment={"HOSTD_VMM_READY_TIMEOUT_S": "1.0"})
        ref = ref_of("agentless")
        names = (ref.tenant_id, ref.pool_id, ref.instance_id)
        seeded = host.seed(ref, offset=5, mem_mib=32)
        await host.net_up(seeded)
        before = await host.inventory()

        refused = await host.run(StartInstance(*names))

        assert refused["code"] == "unavailable", refused
        assert refused["retryable"]
        assert refused["status"] == "created"
        assert not refused.get("left_behind")
        assert await host.inventory() == before

        host.seed(ref, tags={"hostd.ready": "api"}, mem_mib=32)
        started = await host.run(StartInstance(*names))
        assert started["code"] == "ok", started
        assert traffic.flows(seeded.guest_ip)
        slept = await host.run(SleepInstance(*names, force=False))
        assert slept["detail"]["drain"] == "no_agent"
        assert (await host.run(WakeInstance(*names)))["code"] == "ok"
        assert traffic.flows(seeded.guest_ip)
        assert (await host.run(StopInstance(*names)))["detail"]["method"] == "graceful"


def ask_without_answer(uds: Path, request: str) -> None:
    """Send what the guest does not live to answer."""
    with agent.connect(uds) as stream:
        agent.send(stream, request)
