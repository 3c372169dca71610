"""A state bucket that was made anew while no worker ran is filled again."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio

from tests.live_host import live_host
from worker.demo.host import provision_cell


async def test_a_bucket_made_anew_is_filled_again() -> None:
    async with live_host() as host:
        assert (await host.net_up(host.seed()))["code"] == "ok"
        await host.stop_worker()
        bucket = f"KV_{host.subjects.state_bucket}"
        async with host.client() as client:
            await client.nats.jetstream().delete_stream(bucket)
        await provision_cell(host.settings, host.subjects)

        await host.start_worker()

        subject = f"$KV.{host.subjects.state_bucket}.{host.settings.host.id}.network.acme"
        async with asyncio.timeout(20):
            while subject not in {kept for kept, _, _ in await host.kept(bucket)}:
                await asyncio.sleep(0.02)
