"""Memory and CPU of an idle worker, and what each running VM adds."""

import asyncio

from bench.bench_host import BenchHost, cpu_s, rss_kib
from bench.rows import Row, median, row
from schemas.requests import SetupNetwork, StartInstance, StopInstance

VMS = 100
PER_TENANT = 50
MEM_MIB = 8
QUIET_S = 10.0
AT_ONCE = 4
RSS_MIB, CPU_PERCENT, PER_VM_KIB = 64.0, 0.3, 60.0


async def measure(bench: BenchHost) -> list[Row]:
    """A fresh worker first, then the same worker with running VMs."""
    await bench.host.stop_worker()
    await bench.host.start_worker()
    await asyncio.sleep(1)
    fresh_kib = rss_kib(bench.worker_pid)
    idle_percent = await cpu_percent(bench.worker_pid)
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
    before_kib = rss_kib(bench.worker_pid)
    gate = asyncio.Semaphore(AT_ONCE)

    async def start(tenant: str, pool: str, name: str) -> None:
        async with gate:
            await bench.sender.send(StartInstance(tenant, pool, name))

    await asyncio.gather(*(start(*each) for each in names))
    await asyncio.sleep(2)
    after_kib = rss_kib(bench.worker_pid)
    running_percent = await cpu_percent(bench.worker_pid)

    async def stop(tenant: str, pool: str, name: str) -> None:
        async with gate:
            await bench.sender.send(StopInstance(tenant, pool, name))

    await asyncio.gather(*(stop(*each) for each in names))
    grown_kib = (after_kib - before_kib) / VMS
    return [
        row(
            "idle: resident memory",
            "MiB",
            fresh_kib / 1024,
            budget=f"at most {RSS_MIB:g}",
            ok=fresh_kib / 1024 <= RSS_MIB,
        ),
        row(f"{VMS} VMs running: resident memory", "MiB", after_kib / 1024),
        row(
            "resident memory per running VM",
            "KiB",
            grown_kib,
            budget=f"under {PER_VM_KIB:g}",
            ok=grown_kib < PER_VM_KIB,
        ),
        row(
            "idle: CPU",
            "% of a core",
            idle_percent,
            budget=f"at most {CPU_PERCENT:g}",
            ok=idle_percent <= CPU_PERCENT,
        ),
        row(f"{VMS} VMs running: CPU", "% of a core", running_percent),
    ]


async def cpu_percent(pid: int) -> float:
    """Median of three intervals without commands."""
    samples: list[float] = []
    for _ in range(3):
        before = cpu_s(pid)
        await asyncio.sleep(QUIET_S)
        samples.append((cpu_s(pid) - before) / QUIET_S * 100)
    return median(samples)
