"""State in the bucket: compare-and-set, the lease of the host ID, the state writer."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from handlers.clock import now_ms
from schemas import unpack
from tests.broker.server import Host, Server, consuming_host, eventually
from worker.bus.nats import NatsBus
from worker.bus.protocol import BusError, StateConflict
from worker.lease import Holder, Lease, LeaseHeld
from worker.state_writer import CONCURRENT_MAX, StateWriter

KEY = "h1.instance.acme.web.i-1"
HOST_KEY = "h1.host"


@dataclass(frozen=True)
class Row:
    key: str
    value: bytes | None
    seq: int


class Dirty:
    """A source in memory, as the journal is one."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self._arrival = asyncio.Event()
        self._clean = asyncio.Event()
        self.seq = 0

    def put(self, key: str, status: str | None, journal_id: str = "j1") -> bytes | None:
        self.seq += 1
        value = None
        if status is not None:
            value = unpack.pack({"status": status, "journal_id": journal_id, "seq": self.seq})
        self.rows[key] = Row(key, value, self.seq)
        self._arrival.set()
        self._clean.clear()
        return value

    def dirty(self) -> Sequence[Row]:
        return tuple(self.rows.values())

    async def wait_dirty(self) -> None:
        while not self.rows:
            self._arrival.clear()
            await self._arrival.wait()

    def written(self, key: str, seq: int) -> None:
        if key in self.rows and self.rows[key].seq == seq:
            del self.rows[key]
        if not self.rows:
            self._clean.set()

    async def wait_clean(self) -> None:
        async with asyncio.timeout(10):
            await self._clean.wait()


def lease_of(bus: NatsBus, machine_id: str, *, lease_s: float = 30.0) -> Lease:
    holder = Holder(machine_id, "boot-1", "j1")
    facts = {"host_state": "ready", "capacity": {"vcpus": 4}, "seq": 7}
    return Lease(bus, HOST_KEY, holder, lambda: facts, lease_s=lease_s)


async def revision_of(host: Host, key: str) -> int:
    found = await host.bus.read_state(key)
    return found[1] if found else 0


async def value_at(host: Host, key: str) -> bytes | None:
    found = await host.bus.read_state(key)
    return found[0] if found else None


@asynccontextmanager
async def writing(
    host: Host, source: Dirty, *, lease_s: float = 30.0
) -> AsyncGenerator[StateWriter]:
    lease = lease_of(host.bus, "m1", lease_s=lease_s)
    await lease.acquire()
    writer = StateWriter(host.bus, source, "j1", lease)
    tasks = [asyncio.create_task(lease.run()), asyncio.create_task(writer.run())]
    try:
        yield writer
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results


async def test_compare_and_set(server: Server) -> None:
    async with consuming_host(server) as host:
        bus = host.bus
        assert await bus.read_state(KEY) is None
        first = await bus.write_state(KEY, b"1", revision=0)
        second = await bus.write_state(KEY, b"2", revision=first)

        with pytest.raises(StateConflict):
            await bus.write_state(KEY, b"x", revision=first)
        with pytest.raises(StateConflict):
            await bus.write_state(KEY, b"x", revision=0)
        with pytest.raises(StateConflict):
            await bus.delete_state(KEY, revision=first)
        assert await bus.read_state(KEY) == (b"2", second)

        await bus.delete_state(KEY, revision=second)
        assert await bus.read_state(KEY) is None
        third = await bus.write_state(KEY, b"3", revision=0)
        assert await bus.write_state(KEY, b"4", revision=None) > third
        await bus.delete_state(KEY, revision=None)
        await bus.delete_state(KEY, revision=None)
        assert await bus.read_state(KEY) is None


async def test_the_newest_value_of_each_key_is_written(server: Server) -> None:
    async with consuming_host(server) as host:
        source = Dirty()
        async with writing(host, source):
            before = await revision_of(host, HOST_KEY)
            for number in range(100):
                source.put(KEY, f"s{number}")
            last = source.put(KEY, "running")
            other = source.put("h1.network.acme", "up")
            await source.wait_clean()

            assert await value_at(host, KEY) == last
            assert await value_at(host, "h1.network.acme") == other
            # Two writes to the bucket since the lease's, though the key had 100 values.
            written = {await revision_of(host, KEY), await revision_of(host, "h1.network.acme")}
            assert written == {before + 1, before + 2}

            source.put(KEY, None)
            await source.wait_clean()
            assert await host.bus.read_state(KEY) is None
            source.put(KEY, "running")
            await source.wait_clean()
            assert await host.bus.read_state(KEY) is not None


async def test_a_value_written_before_a_restart_is_kept(server: Server) -> None:
    async with consuming_host(server) as host:
        await host.bus.write_state(KEY, b"of an earlier life", revision=0)
        source = Dirty()
        async with writing(host, source) as writer:
            value = source.put(KEY, "running")
            await source.wait_clean()

            assert await value_at(host, KEY) == value
            assert not writer.fenced


async def test_a_write_with_a_lost_acknowledgement_is_read_back(server: Server) -> None:
    async with consuming_host(server) as host:
        source = Dirty()
        async with writing(host, source) as writer:
            source.put(KEY, "starting")
            await source.wait_clean()
            revision = writer._revisions[KEY]
            # The bucket already has the bytes that are written next; the writer does not know.
            value = unpack.pack({"status": "running", "journal_id": "j1", "seq": source.seq + 1})
            await host.bus.write_state(KEY, value, revision=revision)
            source.put(KEY, "running")
            await source.wait_clean()

            assert not writer.fenced
            assert await value_at(host, KEY) == value


async def test_an_older_value_that_is_written_late_is_overwritten(server: Server) -> None:
    async with consuming_host(server) as host:
        source = Dirty()
        async with writing(host, source) as writer:
            old = source.put(KEY, "starting")
            assert old is not None
            await source.wait_clean()
            await host.bus.write_state(KEY, old, revision=None)
            new = source.put(KEY, "running")
            await source.wait_clean()

            assert await value_at(host, KEY) == new
            assert not writer.fenced


async def test_a_value_of_another_writer_fences_until_the_lease_is_renewed(server: Server) -> None:
    async with consuming_host(server) as host:
        source = Dirty()
        async with writing(host, source) as writer:
            source.put(KEY, "starting")
            await source.wait_clean()
            foreign = unpack.pack({"status": "running", "journal_id": "j2", "seq": 1})
            await host.bus.write_state(KEY, foreign, revision=None)
            taken = unpack.pack({"machine_id": "m2", "lease_until_ms": now_ms() + 60_000})
            await host.bus.write_state(HOST_KEY, taken, revision=None)

            source.put(KEY, "running")
            assert await eventually(lambda: writer.fenced, 5)
            assert await value_at(host, KEY) == foreign

            ended = unpack.pack({"machine_id": "m2", "lease_until_ms": 1})
            await host.bus.write_state(HOST_KEY, ended, revision=None)
            writer._lease.touch()
            await source.wait_clean()
            assert not writer.fenced


async def test_a_row_of_the_host_key_renews_the_lease(server: Server) -> None:
    async with consuming_host(server) as host:
        source = Dirty()
        async with writing(host, source) as writer:
            before = writer._lease.generation
            source.put(HOST_KEY, "draining")
            await source.wait_clean()

            assert await eventually(lambda: writer._lease.generation > before, 5)


async def test_state_waits_for_a_server_that_is_down(server: Server) -> None:
    async with consuming_host(server) as host:
        source = Dirty()
        async with writing(host, source):
            await server.stop()
            assert await eventually(lambda: not host.bus.connected, 5)
            value = source.put(KEY, "running")
            await server.start()
            await source.wait_clean()

            assert await value_at(host, KEY) == value


async def test_a_valid_lease_of_another_machine_stops_the_start(server: Server) -> None:
    async with consuming_host(server) as host:
        first = lease_of(host.bus, "m1")
        await first.acquire()

        with pytest.raises(
            LeaseHeld, match=r"another host has the lease of this host ID.*'m1'.*\[host\] id"
        ):
            await lease_of(host.bus, "m2").acquire()

        await lease_of(host.bus, "m1").acquire()
        found = await host.bus.read_state(HOST_KEY)
        assert found
        value = unpack.unpack_map(found[0])
        assert value["machine_id"] == "m1"
        assert value["boot_id"] == "boot-1"
        assert value["host_state"] == value["status"] == "ready"
        assert value["capacity"] == {"vcpus": 4}
        assert (value["journal_id"], value["seq"], value["v"]) == ("j1", 7, 1)


async def test_a_released_or_expired_lease_can_be_taken(server: Server) -> None:
    async with consuming_host(server) as host:
        first = lease_of(host.bus, "m1")
        await first.acquire()
        await first.release()
        second = lease_of(host.bus, "m2", lease_s=0.05)
        await second.acquire()
        await asyncio.sleep(0.06)

        await lease_of(host.bus, "m1").acquire()

        assert not first.held


async def test_a_lost_lease_is_logged_and_stops_nothing(server: Server) -> None:
    async with consuming_host(server) as host:
        lease = lease_of(host.bus, "m1", lease_s=0.3)
        await lease.acquire()
        renewing = asyncio.create_task(lease.run())
        try:
            taken = unpack.pack({"machine_id": "m2", "lease_until_ms": now_ms() + 500})
            await host.bus.write_state(HOST_KEY, taken, revision=None)
            assert await eventually(lambda: not lease.held, 5)
            assert not renewing.done()

            await host.bus.write_state(HOST_KEY, b"\xc1 not msgpack", revision=None)
            assert await eventually(lambda: lease.held, 5)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)


async def test_acquiring_waits_for_a_server(server: Server) -> None:
    async with consuming_host(server) as host:
        await server.stop()
        acquiring = asyncio.create_task(lease_of(host.bus, "m1").acquire())
        await asyncio.sleep(0)
        assert not acquiring.done()
        await server.start()

        await asyncio.wait_for(acquiring, 10)


async def test_keys_that_the_bucket_refuses_hold_up_no_others(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are written at once, all older: as of a bucket that is full."""
    async with consuming_host(server) as host:
        write = host.bus.write_state

        async def full(key: str, value: bytes, *, revision: int) -> int:
            if ".new-" in key:
                raise BusError("maximum bytes exceeded")
            return await write(key, value, revision=revision)

        monkeypatch.setattr(host.bus, "write_state", full)
        source = Dirty()
        for number in range(2 * CONCURRENT_MAX):
            source.put(f"h1.instance.acme.web.new-{number}", "running")
        wanted = source.put(KEY, "stopped")

        async with writing(host, source):
            async with asyncio.timeout(20):
                while await value_at(host, KEY) != wanted:
                    await asyncio.sleep(0.05)

        assert KEY not in source.rows
