"""What a command costs with thousands of instances in the journal, on a host in memory.

Journal, lanes, dispatch and handlers are the real ones; mechanisms, files and bus are not there.
Two workers in one process take turns: one with one other instance on record, one with all.
"""

import asyncio
import gc
import logging
import tempfile
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from bench.report.budgets import at_most, within_percent
from bench.report.rows import Measured, Row, row
from schemas import codec
from schemas.codes import Code
from schemas.files import InstanceResources, PoolSpec, TenantConfig, TenantQuota
from schemas.records import InstanceRecord, NetworkRecord, Status
from schemas.requests import (
    InstanceRef,
    Request,
    SetupNetwork,
    StartInstance,
    TeardownNetwork,
    TenantNet,
)
from tests.constants import DESTROY, NET, REF, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import recovery

ROUNDS, RECOVERIES = 120, 3
TENANTS, EACH = 500, 4
FAKES, FAKES_EACH = 1000, 100
PERCENT = 10.0
OFFSET, FIRST_OFFSET = 5, 3
RECOVERY_MS = 5000.0
UP, DOWN = SetupNetwork("acme", NET), TeardownNetwork("acme", NET)
CYCLE: tuple[tuple[str, Request], ...] = (
    ("SetupNetwork", UP),
    ("StartInstance", START),
    ("no-op", START),
    ("SleepInstance", SLEEP),
    ("WakeInstance", WAKE),
    ("StopInstance", STOP),
    ("", START),
    ("DestroyInstance", DESTROY),
    ("TeardownNetwork", DOWN),
)


async def measure(rounds: int = ROUNDS) -> Measured:
    # structlog's default renderer takes longer than hostd's own, in both columns alike
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory(prefix="hostd-bench-", dir="/var/tmp") as directory:
        rows = await commands(Path(directory), rounds)
        found = [await recover(Path(directory, f"r-{n}")) for n in range(RECOVERIES)]
    name = f"kill -9 with {FAKES} VMs in the journal (fakes): start to first reply"
    return Measured([*rows, row(name, "ms", found, budget=at_most(RECOVERY_MS))])


async def commands(directory: Path, rounds: int) -> list[Row]:
    took_ms: dict[bool, defaultdict[str, list[float]]] = {}
    cpu_ms: dict[bool, defaultdict[str, list[float]]] = {}
    async with AsyncExitStack() as stack:
        workers: dict[bool, MemoryWorker] = {}
        for many in (False, True):
            machine = roomy()
            path = directory / f"many-{many}"
            workers[many] = await stack.enter_async_context(memory_worker(path, machine))
            await populate(workers[many], TENANTS if many else 1, EACH if many else 1)
            took_ms[many], cpu_ms[many] = defaultdict(list), defaultdict(list)
        gc.collect()
        gc.freeze()
        for number in range(rounds + 1):
            for many in (bool(number % 2), not number % 2):
                workers[many].machine.files[REF] = instance_file(REF, OFFSET)
                for name, request in CYCLE:
                    began, cpu = time.perf_counter_ns(), time.process_time_ns()
                    worker = workers[many]
                    outcome = await worker.outcome(await worker.send(request))
                    wall = time.perf_counter_ns() - began
                    if (reply := codec.decode_reply(outcome)).code is not Code.OK:
                        raise RuntimeError(f"{name}: {reply}")
                    await asyncio.sleep(0.002)  # what follows the outcome
                    if number:  # the first one is a warm-up
                        took_ms[many][name].append(wall / 1e6)
                        cpu_ms[many][name].append((time.process_time_ns() - cpu) / 1e6)
    against = f"{TENANTS * EACH} instances of {TENANTS} tenants (fakes) against 1"
    budget = within_percent(PERCENT)
    rows: list[Row] = []
    for name in dict.fromkeys(name for name, _ in CYCLE if name):
        for what, unit_ms in (("p50", took_ms), ("CPU", cpu_ms)):
            mine, raw = unit_ms[True][name], unit_ms[False][name]
            rows.append(row(f"{name}, {against}: {what}", "ms", mine, raw, budget=budget))
    return rows


def roomy() -> FakeHost:
    """A host that admits all of them."""
    machine = seeded()
    machine.memory_mib, machine.cpus = 1 << 24, 1 << 10
    return machine


async def populate(worker: MemoryWorker, tenants: int, each: int) -> None:
    """Running instances and networks of other tenants, on record only."""
    records = worker.journal.records
    for number in range(tenants):
        tenant = f"t-{number}"
        net = net_of(1000 + number)
        await records.put_network(NetworkRecord(tenant_id=tenant, net=net, status="up", since_ms=1))
        for guest in range(each):
            await records.put_instance(
                InstanceRecord(
                    ref=InstanceRef(tenant, "web", f"i-{guest}"),
                    status=Status.RUNNING,
                    since_ms=1,
                    launch=1,
                    uid_slot=number * each + guest,
                    offset=FIRST_OFFSET + guest,
                    net=net,
                    revision="r1",
                    vcpus=1,
                    mem_mib=1,
                )
            )


def net_of(net_id: int) -> TenantNet:
    subnet = f"10.{net_id // 250}.{net_id % 250}"
    return TenantNet(net_id, f"{subnet}.0/24", f"{subnet}.1", f"br-tenant-{net_id}")


async def recover(path: Path) -> float:
    """Milliseconds from opening the journal to the reply of the first command."""
    machine = roomy()
    refs = [
        InstanceRef(f"t-{number // FAKES_EACH}", "web", f"i-{number}") for number in range(FAKES)
    ]
    async with memory_worker(path, machine) as worker:
        for number, ref in enumerate(refs):
            if number % FAKES_EACH == 0:
                await add_tenant(worker, machine, ref.tenant_id, number // FAKES_EACH)
            offset = FIRST_OFFSET + number % FAKES_EACH
            machine.files[ref] = instance_file(ref, offset, net_id_of(ref))
        starts = [StartInstance(ref.tenant_id, "web", ref.instance_id) for ref in refs]
        sent = [await worker.send(request) for request in starts]
        for command_id in sent:
            if (await worker.reply(command_id)).code is not Code.OK:
                raise RuntimeError(f"{command_id} failed")
        launched = list(machine.jailer_runs)
    began = time.perf_counter_ns()
    async with memory_worker(path, machine) as worker:
        counts = await recovery(worker).run()
        await worker.run(starts[0])
        took_ms = (time.perf_counter_ns() - began) / 1e6
        if counts.adopted != FAKES or machine.jailer_runs != launched:
            raise RuntimeError(f"not all VMs were adopted untouched: {counts}")
    return took_ms


def net_id_of(ref: InstanceRef) -> int:
    return 10 + int(ref.tenant_id.removeprefix("t-"))


async def add_tenant(worker: MemoryWorker, machine: FakeHost, tenant_id: str, number: int) -> None:
    net_id = 10 + number
    base = f"10.240.{net_id}"
    net = TenantNet(net_id, f"{base}.0/24", f"{base}.1", f"br-tenant-{net_id}")
    quota = TenantQuota(1000, 1 << 20, 1000, 1000, 1000, 1000, 1000)
    machine.tenants[tenant_id] = TenantConfig(tenant_id, quota, net)
    machine.pools[tenant_id, "web"] = PoolSpec("web", tenant_id, InstanceResources(1, 128, 16))
    machine.revisions[tenant_id, "web"] = "r1"
    if (await worker.run(SetupNetwork(tenant_id, net))).code is not Code.OK:
        raise RuntimeError(f"no network of {tenant_id}")
