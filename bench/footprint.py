"""Memory and CPU of an idle worker, and what each running VM adds; foreign changes of nftables."""

import asyncio
import time
from contextlib import ExitStack

from bench.bench_host import BenchHost, attached
from bench.cpu import in_the_background, rss_kib
from bench.networks import nft
from bench.report.budgets import at_most
from bench.report.rows import Measured, Row, row
from schemas.requests import SetupNetwork, StartInstance, StopInstance
from worker.reconcile.reconciler import PASS_EVERY_S

VMS = 500
PER_TENANT = 50
MEM_MIB = 8
OVERHEAD_MIB = 16  # allocated, not used: so that the VMs are admitted on a small machine
INTERVALS = 3
AT_ONCE = 4
RSS_MIB, CPU_PERCENT, PER_VM_KIB = 64.0, 0.3, 60.0
TENANTS, FIRST_NET_ID = 40, 400
CHANGES_PER_S, CHANGES_S = 10, 8.0
CHANGES_PERCENT = 10.0
FOREIGN = "table inet foreign"


async def measure(bench: BenchHost, rounds: int = INTERVALS) -> Measured:
    """A fresh worker first, then the same worker with running VMs, then with foreign changes."""
    await bench.host.stop_worker()
    await bench.host.start_worker()
    async with attached(bench.host) as fresh:
        await asyncio.sleep(1)
        fresh_mib = rss_kib(*fresh.processes) / 1024
        idle = await cpu_percent(fresh, rounds)
        rows = [
            row("idle: resident memory", "MiB", [fresh_mib], budget=at_most(RSS_MIB)),
            row("idle: CPU", "% of a core", idle, budget=at_most(CPU_PERCENT)),
        ]
        rows += await with_vms(fresh, rounds)
        rows.append(await with_foreign_changes(fresh, rounds))
    return Measured(rows)


async def with_vms(bench: BenchHost, rounds: int) -> list[Row]:
    names: list[tuple[str, str, str]] = []
    for number in range(VMS):
        tenant = f"many-{number // PER_TENANT}"
        net_id = 300 + number // PER_TENANT
        name = f"i-{number % PER_TENANT}"
        seeded = bench.seed(name, tenant=tenant, net_id=net_id, mem_mib=MEM_MIB, data_disk_mib=0)
        if number % PER_TENANT == 0:
            await bench.sender.send(SetupNetwork(tenant, seeded.net))
            # Warm-up: permanent allocations of the first start and stop are not a VM's share.
            for request in (StartInstance, StopInstance):
                await bench.sender.send(request(tenant, "web", name))
        names.append((tenant, "web", name))
    await asyncio.sleep(1)
    before_kib = rss_kib(*bench.processes)
    with ExitStack() as stack:
        known: set[int] = set()
        for first in range(0, VMS, PER_TENANT):
            starts = [StartInstance(*each) for each in names[first : first + PER_TENANT]]
            await bench.sender.send_all(starts, AT_ONCE)
            started = set(bench.host.vm_pids()) - known
            known |= started
            stack.enter_context(in_the_background(sorted(started)))
        await asyncio.sleep(2)
        after_kib = rss_kib(*bench.processes)
        running = await cpu_percent(bench, rounds)
        await bench.sender.send_all([StopInstance(*each) for each in names], AT_ONCE)
    grown_kib = (after_kib - before_kib) / VMS
    return [
        row(f"{VMS} VMs running: resident memory", "MiB", [after_kib / 1024]),
        row("resident memory per running VM", "KiB", [grown_kib], budget=at_most(PER_VM_KIB)),
        row(f"{VMS} VMs running: CPU", "% of a core", running, budget=at_most(CPU_PERCENT)),
    ]


async def with_foreign_changes(bench: BenchHost, rounds: int) -> Row:
    """Another program changes a table of its own, in the namespace of many tenants."""
    for number in range(TENANTS):
        seeded = bench.seed("i-0", tenant=f"quiet-{number}", net_id=FIRST_NET_ID + number)
        await bench.sender.send(SetupNetwork(f"quiet-{number}", seeded.net))
    await bench.quiet()
    nft(f"add {FOREIGN}\nadd set inet foreign s {{ type ipv4_addr; }}\n")
    percents: list[float] = []
    try:
        for _ in range(rounds):
            before_ms, began = bench.cpu_ms(), time.monotonic()
            for number in range(int(CHANGES_S * CHANGES_PER_S)):
                verb = "delete" if number % 2 else "add"
                await asyncio.to_thread(nft, f"{verb} element inet foreign s {{ 192.0.2.1 }}\n")
                due = began + (number + 1) / CHANGES_PER_S
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            took_ms = (time.monotonic() - began) * 1e3
            percents.append((bench.cpu_ms() - before_ms) / took_ms * 100)
    finally:
        nft(f"delete {FOREIGN}\n")
    return row(
        f"{CHANGES_PER_S} foreign nftables changes a second, {TENANTS} tenants: CPU",
        "% of a core",
        percents,
        budget=at_most(CHANGES_PERCENT),
    )


async def cpu_percent(bench: BenchHost, rounds: int) -> list[float]:
    """Intervals without commands, each as long as it takes from one pass of the reconciler to the
    next: shorter ones had a pass or not, and their median was that of the time between."""
    samples: list[float] = []
    for _ in range(rounds):
        before_ms = bench.cpu_ms()
        await asyncio.sleep(PASS_EVERY_S)
        samples.append((bench.cpu_ms() - before_ms) / 1e3 / PASS_EVERY_S * 100)
    return samples
