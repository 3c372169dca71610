"""Publishes events as a host does, many at once."""

from collections.abc import Mapping

import msgpack

from tests.page.fleet import SUBJECTS
from worker.bus.connection import Connection

FROM_MS = 1_790_000_000_000


class Sender:
    """One host; what it returns from, the stream has."""

    def __init__(self, host: Connection, host_id: str = "h3") -> None:
        self.host, self.host_id, self.seq = host, host_id, 0

    def event(self, about: str, detail: Mapping[str, object]) -> tuple[str, bytes]:
        self.seq += 1
        seq = self.seq
        key = {"id": f"{about} {seq}", "journal_id": "j", "seq": seq, "at_ms": FROM_MS + seq}
        subject = f"{SUBJECTS.root}.{self.host_id}.evt.{about}"
        return subject, msgpack.packb(key | {"detail": dict(detail)})

    async def publish(self, about: str, *details: Mapping[str, object]) -> None:
        """All of them, the last one acknowledged by the stream."""
        for detail in details[:-1]:
            await self.host.send(*self.event(about, detail))
        answer = await self.host.request(*self.event(about, details[-1]))
        assert b'"seq"' in answer.data

    async def usage(self, instance: str, *details: Mapping[str, object]) -> None:
        await self.publish(f"instance.{instance}.usage", *details)

    async def fill(self, about: str, count: int) -> None:
        nothing: dict[str, object] = {}
        await self.publish(about, *([nothing] * count))
