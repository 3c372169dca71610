"""A crowd at one lane, and all lanes busy: others are answered in time."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable

from schemas import codec
from schemas.envelopes import Command
from schemas.requests import InstanceRef, SetupNetwork, SleepInstance, StartInstance, StopInstance
from schemas.subjects import Lane
from tests.constants import REF, START, STOP
from tests.crash.kills import until
from tests.live_host import LiveHost, live_host

CROWD = 500
LANE_DEPTH = 100
PING_S = 1.0
COMMAND_S = 5.0


def ref(n: int, tenant_id: str = "acme") -> InstanceRef:
    return InstanceRef(tenant_id, "web", f"i-{n}")


def names(of: InstanceRef) -> tuple[str, str, str]:
    return of.tenant_id, of.pool_id, of.instance_id


async def hold(host: LiveHost, of: InstanceRef) -> None:
    """A running instance with a Sleep in its drain, which the guest does not let end."""
    assert (await host.run(StartInstance(*names(of))))["code"] == "ok"
    await host.ask_guest({"Set": {"drain": "hold"}}, of)
    request = SleepInstance(*names(of), force=False, drain_timeout_secs=600)
    await host.publish(request, f"held-{of.instance_id}")
    await host.wait_status("draining", of)


async def timed(work: Awaitable[dict[str, object]], code: str = "ok") -> float:
    started = time.monotonic()
    assert (await work)["code"] == code
    return time.monotonic() - started


async def throw(host: LiveHost, count: int) -> None:
    """Starts for one lane, each with an id of its own, as fast as the stream takes them."""
    subject = host.subjects.command(Lane.instance(REF))
    async with host.client() as client:
        publish = client.nats.jetstream().publish
        crowd = [Command(id=f"crowd-{n}", request=START) for n in range(count)]
        await asyncio.gather(*(publish(subject, codec.encode_command(c)) for c in crowd))


async def codes(host: LiveHost, prefix: str) -> Counter[str]:
    """How often which code is in the reply stream; two replies to one id are a failure."""
    found: dict[str, str] = {}
    for _, _, data in await host.kept(host.subjects.replies_stream):
        reply = codec.decode_reply(data)
        if reply.id.startswith(prefix):
            assert reply.id not in found
            found[reply.id] = str(reply.code)
    return Counter(found.values())


async def test_500_commands_at_one_lane_hold_up_nobody_not_even_its_stop() -> None:
    async with live_host() as host:
        seeded = host.seed(REF)
        host.seed(ref(2))
        await host.net_up(seeded)
        await hold(host, REF)

        crowd = asyncio.create_task(throw(host, CROWD))
        assert await timed(host.ping()) < PING_S
        assert await timed(host.run(StartInstance(*names(ref(2))))) < COMMAND_S
        await crowd
        assert await timed(host.ping()) < PING_S
        assert await timed(host.run(StopInstance(*names(ref(2))))) < COMMAND_S
        await host.wait_unfinished(LANE_DEPTH)
        assert await codes(host, "crowd-") == {"exhausted": CROWD - (LANE_DEPTH - 1)}
        assert await timed(host.run(STOP)) < COMMAND_S

        await host.wait_unfinished(0)
        assert await codes(host, "crowd-") == {
            "exhausted": CROWD - (LANE_DEPTH - 1),
            "superseded": LANE_DEPTH - 1,
        }
        assert await codes(host, "held-") == {"superseded": 1}
        assert (await host.describe())["status"] == "stopped"
        assert host.jailer_runs() == 2


async def test_with_all_lanes_busy_others_and_a_stop_answer_in_time() -> None:
    async with live_host() as host:
        seeds = [host.seed(ref(n)) for n in range(1, 10)]
        other = host.seed(ref(1, "umbra"), net_id=8)
        await host.net_up(seeds[0])
        held = [ref(n) for n in range(1, 9)]
        for of in held:
            await hold(host, of)

        assert await timed(host.ping()) < PING_S
        assert await timed(host.run(SetupNetwork("umbra", other.net))) < COMMAND_S
        assert await timed(host.run(StartInstance(*names(ref(1, "umbra"))))) < COMMAND_S
        assert await timed(host.run(StartInstance(*names(ref(9))))) < COMMAND_S
        assert await timed(host.run(StopInstance(*names(held[3])))) < COMMAND_S

        assert await codes(host, "held-") == {"superseded": 1}


async def test_a_start_that_waits_for_its_turn_to_boot_ends_at_once_for_a_stop() -> None:
    async with live_host(boot_args="mini.agent=off", boots=1) as host:
        seeded = host.seed(REF)
        host.seed(ref(2))
        await host.net_up(seeded)
        await host.publish(START, "boots")
        await host.wait_status("starting")
        await until(lambda: host.jailer_runs() == 1, "the first launch")
        await host.publish(StartInstance(*names(ref(2))), "waits")
        await host.wait_status("starting", ref(2))

        assert await timed(host.run(StopInstance(*names(ref(2))))) < COMMAND_S
        assert (await host.result("waits"))["code"] == "superseded"
        assert await timed(host.run(STOP)) < COMMAND_S
        assert (await host.result("boots"))["code"] == "superseded"
        assert host.jailer_runs() == 1
        assert host.vm_pids() == []
