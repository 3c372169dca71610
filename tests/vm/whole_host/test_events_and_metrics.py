"""What hostd tells while it works: events without a gap, state that follows them, the lease."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nats.js.errors
import pytest
import pytest_asyncio

from schemas.requests import (
    DestroyInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from schemas.subjects import Lane
from tests.live_host import LiveHost
from tests.plain import unpacked
from tests.vm.whole_host.shared_host import events, ref_of
from worker.cli.seed import Seeded
from worker.release.build import this_build

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIFE = [
    "starting", "running", "draining", "snapshotting", "sleeping", "waking", "running",
    "stopping", "stopped", "starting", "running", "destroying", "destroyed",
]  # fmt: skip
REF = ref_of("told")
NAMES = (REF.tenant_id, REF.pool_id, REF.instance_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seeded(host: LiveHost) -> AsyncIterator[Seeded]:
    made = host.seed(REF, offset=5, mem_mib=32)
    assert (await host.net_up(made))["code"] == "ok"
    yield made


async def state(host: LiveHost, key: str) -> dict[str, Any] | None:
    """The bucket's value of a key."""
    async with host.client() as client:
        bucket = await client.nats.jetstream().key_value(host.subjects.state_bucket)
        try:
            entry = await bucket.get(key)
        except nats.js.errors.KeyNotFoundError:
            return None
    value: dict[str, Any] = unpacked(entry.value or b"")
    return value


async def until_state(host: LiveHost, key: str, status: str | None) -> dict[str, Any]:
    """Wait until the state says so: it follows, replies never wait for it."""
    async with asyncio.timeout(10):
        while True:
            value = await state(host, key)
            if (value or {}).get("status") == status:
                return value or {}
            await asyncio.sleep(0.02)


async def test_each_change_of_a_status_is_one_event_and_state_follows(
    host: LiveHost, seeded: Seeded
) -> None:
    lane = Lane.instance(REF)
    key = host.subjects.state_key(lane)
    ids: list[str] = []
    for request, status in (
        (StartInstance(*NAMES), "running"),
        (StartInstance(*NAMES), "running"),
        (SleepInstance(*NAMES, force=False), "sleeping"),
        (WakeInstance(*NAMES), "running"),
        (StopInstance(*NAMES), "stopped"),
        (StartInstance(*NAMES), "running"),
        (DestroyInstance(*NAMES, wipe_volumes=True), None),
    ):
        reply = await host.run(request)
        assert reply["code"] == "ok", reply
        ids.append(reply["id"])
        value = await until_state(host, key, status)
        if status is not None:
            last = [e for e in await events(host) if e.get("instance_id") == REF.instance_id]
            [told] = [e for e in last if e["seq"] == value["seq"]]
            assert (told["kind"], told["to"]) == ("status", status)
            assert (value["v"], value["journal_id"]) == (1, told["journal_id"])

    mine = [e for e in await events(host) if e.get("instance_id") == REF.instance_id]
    statuses = [e for e in mine if e["kind"] == "status"]
    assert [e["to"] for e in statuses] == LIFE
    assert [e.get("from") for e in statuses[1:]] == LIFE[:-1]
    assert {e["command_id"] for e in statuses} == {i for at, i in enumerate(ids) if at != 1}
    subjects = [s for s, _, _ in await host.kept(host.subjects.events_stream)]
    assert subjects.count(host.subjects.event(lane, "status")) == len(LIFE)


async def test_a_start_that_fails_gives_the_status_back_by_an_event(
    host: LiveHost, seeded: Seeded
) -> None:
    ref = ref_of("artless")
    host.seed(ref, offset=6, mem_mib=32)
    pool = Path(host.settings.paths.data, "tenants", ref.tenant_id, "pools", ref.pool_id)
    for kernel in (pool / "artifacts" / "revisions").glob("*/vmlinux"):
        kernel.unlink()

    refused = await host.run(StartInstance(ref.tenant_id, ref.pool_id, ref.instance_id))

    assert refused["code"] == "not_found"
    await until_state(host, host.subjects.state_key(Lane.instance(ref)), "created")
    mine = [e for e in await events(host) if e.get("instance_id") == ref.instance_id]
    chain = [(e.get("from"), e["to"]) for e in mine if e["kind"] == "status"]
    assert chain == [(None, "starting"), ("starting", "created")]


async def test_a_networks_key_comes_and_goes_with_it(host: LiveHost, seeded: Seeded) -> None:
    key = host.subjects.state_key(Lane.network(REF.tenant_id))
    value = await until_state(host, key, "up")
    assert value["bridge_name"] == seeded.net.bridge_name

    assert (await host.net_down(seeded.net))["code"] == "ok"
    await until_state(host, key, None)
    assert (await host.net_up(seeded))["code"] == "ok"
    await until_state(host, key, "up")

    told = [e for e in await events(host) if e["kind"] == "network"]
    chain = [(e.get("from"), e["to"]) for e in told]
    assert chain == [(None, "up"), ("up", "down"), ("down", "absent"), ("absent", "up")]


async def test_the_events_have_no_gap_and_say_whose_they_are(
    host: LiveHost, seeded: Seeded
) -> None:
    told = await events(host)

    assert [e["seq"] for e in told] == list(range(1, len(told) + 1))
    assert len({e["journal_id"] for e in told}) == 1
    for event in told:
        assert event["v"] == 1
        assert event["host_id"] == host.settings.host.id
        assert event["id"] == f"{event['host_id']}:{event['journal_id']}:{event['seq']}"
        assert event["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    times = [e["at_ms"] for e in told]
    assert times == sorted(times)


async def test_the_hosts_own_value_is_a_live_lease(host: LiveHost, seeded: Seeded) -> None:
    value = await until_state(host, host.subjects.host_key, "ready")

    assert value["machine_id"]
    assert value["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert value["lease_until_ms"] > time.time() * 1000
    assert value["version"] == version("hostd")
    here = this_build()
    assert (value["version"], value["commit"]) == (here.version, here.commit)
    pong = (await host.ping())["detail"]
    assert (pong["version"], pong["commit"]) == (here.version, here.commit)
    assert value["capacity"]["instances"] == 0
    assert value["journal_id"] == (await events(host))[0]["journal_id"]


async def test_a_restart_goes_on_with_the_numbers(host: LiveHost, seeded: Seeded) -> None:
    before = await events(host)
    assert await host.stop_worker() == 0
    gone = await state(host, host.subjects.host_key)
    assert gone is not None
    assert gone["lease_until_ms"] <= time.time() * 1000

    await host.start_worker()

    async with asyncio.timeout(10):
        while (after := await events(host))[-1]["kind"] != "recovered":
            await asyncio.sleep(0.02)
    assert [e["seq"] for e in after] == list(range(1, len(after) + 1))
    assert after[: len(before)] == before
    assert {e["journal_id"] for e in after} == {before[0]["journal_id"]}
