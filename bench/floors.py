"""What disk, broker and kernel take alone for the parts that every command is made of."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import fcntl
import os
import sqlite3
import struct
import time
from collections.abc import Callable
from functools import partial

from bench.bench_host import BenchHost
from bench.raw.bare import TAP_FLAGS, TUNSETIFF
from bench.report.rows import Measured, floor

ROUNDS = 100
ROW = bytes(500)
TAP = "bench-floor"
STREAM = "bench-floor"


async def measure(bench: BenchHost, rounds: int = ROUNDS) -> Measured:
    """One after the other, on the file system and with the server of the measured host."""
    commits = await asyncio.to_thread(commits_ms, f"{bench.host.directory}/floor.db", rounds)
    published = await publishes_ms(bench, rounds)
    made, deleted = await asyncio.to_thread(taps_ms, rounds)
    return Measured(
        [
            floor("one durable commit of SQLite (WAL, FULL)", "ms", commits),
            floor("one JetStream publish until its ack", "ms", published),
            floor("kernel makes a TAP", "ms", made),
            floor("kernel deletes a TAP, nothing else running", "ms", deleted),
        ]
    )


def commits_ms(path: str, rounds: int) -> list[float]:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, data BLOB)")
        insert = partial(connection.execute, "INSERT INTO t (data) VALUES (?)", (ROW,))
        return [timed_ms(insert) for _ in range(rounds)]
    finally:
        connection.close()


async def publishes_ms(bench: BenchHost, rounds: int) -> list[float]:
    """To a stream in a file, as all of hostd's are."""
    stream = bench.client.nats.jetstream()
    await stream.add_stream(name=STREAM, subjects=[STREAM])
    found: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        await stream.publish(STREAM, ROW)
        found.append((time.perf_counter() - began) * 1e3)
    await stream.delete_stream(STREAM)
    return found


def taps_ms(rounds: int) -> tuple[list[float], list[float]]:
    """Make and delete; deletion is the close of the only descriptor."""
    made: list[float] = []
    deleted: list[float] = []
    request = struct.pack("16sH22x", TAP.encode(), TAP_FLAGS)
    for _ in range(rounds):
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
        try:
            made.append(timed_ms(partial(fcntl.ioctl, descriptor, TUNSETIFF, request)))
        finally:
            deleted.append(timed_ms(partial(os.close, descriptor)))
    return made, deleted


def timed_ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3
