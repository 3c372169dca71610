"""A real host with many networks and running guests: its commands, and a restart after kill -9.

Two hosts take turns, each with a worker and a server of its own: an empty one with one guest, and
a crowded one, whose guests are stopped while the other is measured. In the same rounds is measured
what is not hostd's: the raw loop and the bare script on each host, and the kernel alone with as
many networks.
"""

import asyncio
import ctypes
import os
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field

from bench.bench_host import BenchHost, bench_host
from bench.commands import raw_sender
from bench.cpu import in_the_background, stopped
from bench.launches import CYCLE, Times, bare_cycle
from bench.raw.bare_instance import BareInstance, BareInstances
from bench.raw.kernel_network import KernelNetwork, Taken
from bench.raw.script import Script
from bench.report.budgets import at_most, within_percent
from bench.report.rows import NO_FLOORS, Floors, Measured, Row, floor, row
from bench.sender import Sender
from schemas.requests import (
    Request,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    WakeInstance,
)
from tests.guests.namespace import CLONE_NEWNET

ROUNDS, RESTARTS = 10, 3
TENANTS, GUESTS, PER_TENANT = 500, 200, 4
FIRST_NET_ID, CHANGING_NET_ID = 100, 60
MEM_MIB, AT_ONCE = 8, 4
BARE_OFFSET = 100
MAX_FLOWS = 256
"""Of a tenant: so few that the kernel can track those of all. Else each setup sends a warning."""
SETTLE_S, RAW_AT_ONCE = 0.1, 3
PERCENT = 10.0
RECOVERY_MS = 2000.0
NAMES, OTHER = ("acme", "web", "i-0"), ("acme", "web", "i-1")
AGAINST = f"{GUESTS} guests, {TENANTS} networks against 1"


@dataclass
class Side:
    """One of the hosts, and what was found on it, in milliseconds: by command, until the reply and
    of the worker's CPU until it was quiet; of the raw loop; and of the kernel alone."""

    bench: BenchHost
    raw: Sender
    kernel: KernelNetwork
    script: Script
    enter: Callable[[], None]
    bare: BareInstance = field(init=False)
    cycle: list[tuple[str, Request]] = field(default_factory=list[tuple[str, Request]])
    took_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    raw_ms: list[float] = field(default_factory=list[float])
    times: Times = field(default_factory=Times)

    async def prepare(self, stack: AsyncExitStack) -> None:
        """A tenant with one running guest and two to start, and a network to set up."""
        bench = self.bench
        bench.seed("bare-0", mem_mib=MEM_MIB, data_disk_mib=0, offset=BARE_OFFSET)
        seeded = bench.seed("i-0", mem_mib=MEM_MIB, data_disk_mib=0, offset=10)
        bench.seed("i-1", mem_mib=MEM_MIB, data_disk_mib=0, offset=11)
        changing = bench.seed("i-0", tenant="changing", net_id=CHANGING_NET_ID)
        await bench.sender.send(SetupNetwork("acme", seeded.net))
        await bench.sender.send(StartInstance(*OTHER))
        assert seeded.revision is not None
        bare = BareInstances(
            bench.host,
            seeded.net,
            seeded.revision,
            mem_mib=MEM_MIB,
            data_disk_mib=0,
            enter=self.enter,
        )
        self.bare = stack.enter_context(bare).add("bare-0", BARE_OFFSET)
        no_op = ("no-op", StartInstance(*OTHER))
        networks = (
            ("SetupNetwork", SetupNetwork("changing", changing.net)),
            ("TeardownNetwork", TeardownNetwork("changing", changing.net)),
        )
        self.cycle = [
            no_op,
            *networks,
            ("StartInstance", StartInstance(*NAMES)),
            no_op,
            ("SleepInstance", SleepInstance(*NAMES, force=False)),
            *networks,
            ("WakeInstance", WakeInstance(*NAMES)),
            no_op,
            ("StopInstance", StopInstance(*NAMES)),
            *networks,
        ]

    async def measure(self) -> None:
        """The cycle once, with the raw loop and the kernel after commands of their kind; then the
        bare script through its own."""
        for name, request in self.cycle:
            await asyncio.sleep(SETTLE_S)
            await self.bench.quiet()
            before_ms = self.bench.cpu_ms()
            sent = await self.bench.sender.send(request)
            await self.bench.quiet()
            self.took_ms[name].append(sent.took_ms)
            self.cpu_ms[name].append(self.bench.cpu_ms() - before_ms)
            if name == "no-op":
                for _ in range(RAW_AT_ONCE):
                    await asyncio.sleep(SETTLE_S)
                    self.raw_ms.append((await self.raw.send(request)).took_ms)
            elif name == "TeardownNetwork":
                await asyncio.to_thread(self.kernel.measure)
        await bare_cycle(self.bare, self.script, self.times)

    def forget(self) -> None:
        """What was found so far was a warm-up."""
        for found in (self.took_ms, self.cpu_ms, self.raw_ms, self.kernel):
            found.clear()
        self.times = Times()


async def measure(rounds: int = ROUNDS) -> Measured:
    """The commands in turns on both hosts; then the crowded one's worker is killed and restarts."""
    async with AsyncExitStack() as stack:
        few = await stack.enter_async_context(side(1, 1))
        many = await stack.enter_async_context(side(TENANTS, GUESTS))
        for each in (few, many):
            await each.prepare(stack)
        await crowd(many.bench)
        guests = many.bench.host.vm_pids()
        with in_the_background(guests):
            for number in range(rounds + 1):
                for each in (few, many) if number % 2 else (many, few):
                    with stopped(guests) if each is few else nullcontext():
                        await each.measure()
                if number == 0:
                    few.forget()
                    many.forget()
            if lost := set(guests) - set(many.bench.host.vm_pids()):
                raise RuntimeError(f"{len(lost)} guests ended when they were stopped for a while")
            restarted = await restarts(many.bench)
    return Measured([*compared(few, many), restarted])


@asynccontextmanager
async def side(networks: int, guests: int) -> AsyncGenerator[Side]:
    """A host, and beside it what is measured with it; the process enters its namespace, and when
    that of another host follows, only `enter` leads there."""
    async with (
        bench_host(max_flows=MAX_FLOWS) as bench,
        raw_sender(bench.host) as raw,
        AsyncExitStack() as stack,
    ):
        script = await Script.start()
        stack.push_async_callback(script.close)
        kernel = stack.enter_context(KernelNetwork(networks, guests, PER_TENANT))
        enter = stack.enter_context(this_network())
        yield Side(bench, raw, kernel, script, enter)


@contextmanager
def this_network() -> Generator[Callable[[], None]]:
    """Brings a thread into the network namespace that the calling one is in now."""
    there = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield lambda: enter_network(there)
    finally:
        os.close(there)


def enter_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def compared(few: Side, many: Side) -> list[Row]:
    """The rows of the commands, and their floors."""
    raw = floor(f"raw loop, {AGAINST}, p50", "ms", few.raw_ms, many.raw_ms)
    made, made_cpu = kernel_floors("makes", few.kernel.made, many.kernel.made)
    removed, removed_cpu = kernel_floors("removes", few.kernel.removed, many.kernel.removed)
    wall = {
        "no-op": Floors(slowed=(raw,)),
        "SetupNetwork": Floors((made,), (raw,)),
        "TeardownNetwork": Floors((removed,)),
    }
    scripts: list[Row] = []
    for what in CYCLE:
        name = f"{what.capitalize()}Instance"
        mine, one = many.times.bare_ms(what), few.times.bare_ms(what)
        scripts.append(floor(f"bare script, {name}, {AGAINST}, p50", "ms", one, mine))
        wall[name] = Floors(slowed=(scripts[-1],))
    cpu = {"SetupNetwork": Floors((made_cpu,)), "TeardownNetwork": Floors((removed_cpu,))}
    rows: list[Row] = []
    budget = within_percent(PERCENT)
    for name in dict.fromkeys(name for name, _ in few.cycle):
        rows += [
            row(f"{name}, {AGAINST}, p50", "ms", many.took_ms[name], few.took_ms[name],
                budget=budget, floors=wall[name]),
            row(f"{name}, {AGAINST}: CPU of the worker", "ms", many.cpu_ms[name],
                few.cpu_ms[name], budget=budget, floors=cpu.get(name, NO_FLOORS)),
        ]  # fmt: skip
    return [*rows, raw, *scripts, made, made_cpu, removed, removed_cpu]


def kernel_floors(does: str, few: Taken, many: Taken) -> tuple[Row, Row]:
    what = f"kernel {does} a network, {AGAINST}"
    return (
        floor(f"{what}, p50", "ms", few.wall_ms, many.wall_ms),
        floor(f"{what}: CPU", "ms", few.cpu_ms, many.cpu_ms),
    )


async def crowd(bench: BenchHost) -> None:
    setups: list[Request] = []
    starts: list[Request] = []
    for number in range(TENANTS):
        tenant = f"t-{number}"
        for guest in range(PER_TENANT if len(starts) < GUESTS else 1):
            seeded = bench.seed(
                f"i-{guest}",
                tenant=tenant,
                net_id=FIRST_NET_ID + number,
                mem_mib=MEM_MIB,
                data_disk_mib=0,
                offset=10 + guest,
            )
            if guest == 0:
                setups.append(SetupNetwork(tenant, seeded.net))
            if len(starts) < GUESTS:
                starts.append(StartInstance(tenant, "web", f"i-{guest}"))
    await bench.sender.send_all(setups, AT_ONCE)
    await bench.sender.send_all(starts, AT_ONCE)


async def restarts(bench: BenchHost) -> Row:
    """From the start of a process until the reply to a command sent at once; no VM is touched."""
    found: list[float] = []
    for _ in range(RESTARTS):
        before = bench.host.vm_pids()
        await bench.host.kill_worker()
        began = time.monotonic()
        await bench.host.start_worker(ready=False)
        await bench.sender.send(StartInstance(*OTHER))
        found.append((time.monotonic() - began) * 1e3)
        if sorted(bench.host.vm_pids()) != sorted(before):
            raise RuntimeError("VMs were touched")
        await asyncio.sleep(1)
    return row(
        f"kill -9 with {GUESTS} guests and {TENANTS} networks: start to first reply",
        "ms",
        found,
        budget=at_most(RECOVERY_MS),
    )
