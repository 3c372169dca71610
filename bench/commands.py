"""hostd's own cost per command, against a raw pull-reply-ack loop on the same server."""

import asyncio
import contextlib
import sys
import timeit
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgpack
import msgspec

from bench.bench_host import BenchHost
from bench.raw import raw_loop
from bench.raw.two_commits import two_commits
from bench.report.budgets import at_least, at_most_more
from bench.report.rows import Measured, Row, floor, row
from bench.sender import Sender, Sent
from schemas import codec
from schemas.envelopes import Command
from schemas.requests import SetupNetwork, StartInstance, StopInstance, TeardownNetwork, TenantNet
from schemas.settings import HostSettings
from schemas.subjects import Subjects
from tests.live_host import LiveHost
from worker.cli.client import connect, new_id
from worker.cli.context import CliError
from worker.demo.host import provision_cell

ROUNDS = 300
CHANGES_SHARE = 5
MANY = 4000
LANES = 50
WINDOW = 1000
REPEATS = 3
DECODINGS = 7
MEM_MIB, AT_ONCE = 8, 4
NOTHING_CHANGED_MS, CHANGED_MS = 0.5, 1.0
PER_SECOND = 2500
ASKING = 64


@asynccontextmanager
async def raw_sender(host: LiveHost) -> AsyncGenerator[Sender]:
    """A raw loop as another cell of the same server, and a sender to it."""
    settings = msgspec.structs.replace(
        host.settings, host=HostSettings(id=host.settings.host.id, cell="raw", production=False)
    )
    subjects = Subjects(settings.root, settings.host.id, settings.host.cell)
    await provision_cell(settings, subjects)
    arguments = (host.nats.url, subjects.commands_stream, subjects.consumer)
    process = await asyncio.create_subprocess_exec(
        sys.executable, raw_loop.__file__, *arguments, stdout=-1
    )
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        async with connect(settings) as client:
            sender = Sender(client.nats, subjects)
            await sender.start()
            yield sender
    finally:
        process.kill()
        await process.wait()


async def measure(bench: BenchHost, rounds: int = ROUNDS) -> Measured:
    """Latency one at a time, then throughput."""
    net = await stopped_instances(bench, LANES)
    async with raw_sender(bench.host) as raw:
        rows = await latencies(bench, raw, net, rounds)
        rows += await throughput(bench.sender, raw)
        rows += await beside_queries(bench, raw, rounds)
    return Measured(rows)


async def stopped_instances(bench: BenchHost, count: int) -> TenantNet:
    """Instances that ran and were stopped: another Stop changes nothing."""
    seeded = bench.seed("i-0", mem_mib=MEM_MIB, data_disk_mib=0)
    await bench.sender.send(SetupNetwork("acme", seeded.net))
    names = [("acme", "web", f"i-{number}") for number in range(count)]
    for number in range(count):
        bench.seed(f"i-{number}", mem_mib=MEM_MIB, data_disk_mib=0)
    await bench.sender.send_all([StartInstance(*each) for each in names], AT_ONCE)
    await bench.sender.send_all([StopInstance(*each) for each in names], AT_ONCE)
    return seeded.net


async def latencies(bench: BenchHost, raw: Sender, net: TenantNet, rounds: int) -> list[Row]:
    """Commands that change nothing and that change something, alternating with the raw loop."""
    sender = bench.sender
    stop = StopInstance("acme", "web", "i-0")
    setup, teardown = SetupNetwork("acme", net), TeardownNetwork("acme", net)
    for request in (stop, setup, teardown):
        await sender.send(request)
        await raw.send(request)
    await bench.quiet()
    same: list[float] = []
    base: list[float] = []
    before_ms = bench.cpu_ms()
    for _ in range(rounds):
        same.append((await sender.send(stop)).took_ms)
        base.append((await raw.send(stop)).took_ms)
    cpu_ms = (bench.cpu_ms() - before_ms) / rounds
    changed: list[float] = []
    base_of_changed: list[float] = []
    commits: list[float] = []
    handed_over: list[float] = []
    with two_commits(f"{bench.host.directory}/two-commits.db") as two:
        for _ in range(max(1, rounds // CHANGES_SHARE)):
            for request in (setup, teardown):
                changed.append(aside_ms(await sender.send(request)))
                base_of_changed.append((await raw.send(request)).took_ms)
                commits.append(await two.alone_ms())
                handed_over.append(await two.handed_over_ms())
    return [
        row(
            "command that changes nothing, p50",
            "ms",
            same,
            base,
            budget=at_most_more(NOTHING_CHANGED_MS, "ms"),
        ),
        row("command that changes nothing: CPU of the worker", "ms", [cpu_ms]),
        row(
            "command that changes something, steps aside, p50",
            "ms",
            changed,
            base_of_changed,
            budget=at_most_more(CHANGED_MS, "ms"),
        ),
        floor("the two durable commits of such a command, one thread", "ms", commits),
        floor("the same, each handed to a thread and waited for", "ms", handed_over),
    ]


async def beside_queries(bench: BenchHost, raw: Sender, rounds: int) -> list[Row]:
    """Commands that change nothing while somebody asks for results as fast as it gets answers."""
    host, stop = bench.host.settings.host.id, StopInstance("acme", "web", "i-0")
    await bench.quiet()
    quiet = [(await bench.sender.send(stop)).took_ms for _ in range(rounds)]
    asking = True
    async with connect(bench.host.settings) as client:

        async def ask() -> None:
            while asking:  # not until cancelled: `wait_for` can lose a cancellation to an answer
                await client.ask(host, "status")
                with contextlib.suppress(CliError):  # an unknown command, looked up in the file
                    await client.ask(host, "result", {"id": "unknown"})

        flood = [asyncio.create_task(ask()) for _ in range(ASKING)]
        try:
            flooded = [(await bench.sender.send(stop)).took_ms for _ in range(rounds)]
            base = [(await raw.send(stop)).took_ms for _ in range(rounds)]
        finally:
            asking = False
            await asyncio.gather(*flood, return_exceptions=True)
    return [
        row("command that changes nothing, nobody asks, p50", "ms", quiet),
        row("the same during a flood of queries, p50", "ms", flooded, base),
    ]


def aside_ms(sent: Sent) -> float:
    """Its duration without its steps."""
    return (sent.took_s - sent.step_s()) * 1e3


async def throughput(sender: Sender, raw: Sender) -> list[Row]:
    """Concurrent commands that change nothing, over many lanes."""
    mine: list[float] = []
    base: list[float] = []
    for _ in range(REPEATS):
        for one, rates in ((sender, mine), (raw, base)):
            commands: list[tuple[str, str, bytes]] = []
            for number in range(MANY):
                command_id = new_id()
                request = StopInstance("acme", "web", f"i-{number % LANES}")
                commands.append((command_id, *one.encode(request, command_id)))
            rates.append(MANY / await one.send_many(commands, WINDOW))
    return [
        row(
            "no-op commands through journal, reply and ack",
            "1/s",
            mine,
            base,
            budget=at_least(PER_SECOND),
        )
    ]


async def measure_decoding(rounds: int = DECODINGS) -> Measured:
    """Decode and validate one StartInstance envelope; bare msgpack validates nothing."""
    command = Command(
        id=new_id(),
        request=StartInstance("acme", "web", "i-0"),
        issued_at_ms=1 << 40,
        deadline_ms=1 << 41,
        reply_to="_INBOX.abcdefghijklmnopqrstuv",
        issuer="agentd",
    )
    data = codec.encode_command(command)
    mine: list[float] = []
    base: list[float] = []
    times = 5000
    for _ in range(rounds):
        mine.append(timeit.timeit(lambda: codec.decode_command(data), number=times) / times * 1e6)
        base.append(timeit.timeit(lambda: msgpack.unpackb(data), number=times) / times * 1e6)
    return Measured([row("decode and validate an envelope, p50", "us", mine, base)])
