"""A window of unacknowledged commands that is full: seen at a real server, and its end too."""

import asyncio

from tests.broker.server import Receiver, Server, consuming_host, eventually
from worker.bus.streams import ACK_PENDING


async def test_a_full_window_is_seen_until_acknowledgements_advance(server: Server) -> None:
    receiver = Receiver(ack=False)
    async with consuming_host(server, window=64, receiver=receiver) as host:
        watch = asyncio.create_task(host.bus.watch_acks(every_s=0.1))
        try:
            await asyncio.gather(*(host.command(f"{n}".encode()) for n in range(ACK_PENDING + 20)))
            assert await eventually(lambda: host.bus.ack_window.stuck, 30)

            receiver.ack = True
            assert await eventually(lambda: not host.bus.ack_window.stuck, 30)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
