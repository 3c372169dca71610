"""Each quota and each reserve is what refuses: with one unit less of it, and only then.

What a refusal says: which budget, its size, what is used of it, and who uses it; of other tenants
only how many they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from handlers.admission.budgets import USERS_MAX, Budget
from schemas.codes import Code
from schemas.envelopes import Reply
from schemas.files import InstanceResources, PoolSpec, TenantConfig
from schemas.requests import (
    InstanceRef,
    Request,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    TenantNet,
)
from schemas.settings import LimitSettings, VmmSettings
from tests.constants import DESTROY, NAMES, NET, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker

UP = SetupNetwork("acme", NET)
OTHER_NET = TenantNet(4, "10.240.4.0/24", "10.240.4.1", "br-tenant-4")
FIRST, OTHER = InstanceRef("acme", "web", "i-0"), InstanceRef("umbra", "web", "i-0")
API = StartInstance("acme", "api", "i-9")
FORCED = SleepInstance(*NAMES, force=True)
MIB, GIB = 1 << 20, 1 << 30
SIZE = InstanceResources(1, 128, 1024)  # one vCPU, MiB, MiB of data disk
RESERVE_MIB, OVERHEAD_MIB = 512, 64
NO_RETRIES, ALL_UIDS = LimitSettings(retry_budget_s=0.0), VmmSettings()
THREE_VMS_MIB = 3 * (SIZE.mem_mib + OVERHEAD_MIB)


@dataclass
class Host:
    """A machine and its settings; two instances run, one of them another tenant's."""

    machine: FakeHost
    limits: LimitSettings = NO_RETRIES
    vmm: VmmSettings = ALL_UIDS
    request: Request = START

    def quota(self, **values: int) -> None:
        tenant = self.machine.tenants["acme"]
        quotas = msgspec.structs.replace(tenant.quotas, **values)
        self.machine.tenants["acme"] = msgspec.structs.replace(tenant, quotas=quotas)

    def limit(self, **values: float) -> None:
        self.limits = msgspec.structs.replace(self.limits, **values)


def tenants_vcpus(host: Host, less: int) -> None:
    host.quota(max_vcpus=2 - less)


def tenants_memory(host: Host, less: int) -> None:
    host.quota(max_mem_mib=2 * SIZE.mem_mib - less)


def tenants_running(host: Host, less: int) -> None:
    host.quota(max_running=2 - less)


def tenants_pool(host: Host, less: int) -> None:
    host.quota(max_instances_per_pool=2 - less)


def tenants_pools(host: Host, less: int) -> None:
    host.quota(max_pools=2 - less)
    host.request = API


def tenants_disk(host: Host, less: int) -> None:
    host.quota(max_disk_gib=2 - less)


def cpus(host: Host, less: int) -> None:
    host.machine.cpus = 3 - less
    host.limit(vcpu_overcommit=1.0)


def overcommitted_cpus(host: Host, less: int) -> None:
    host.machine.cpus = 2
    host.limit(vcpu_overcommit=1.5 - 0.25 * less)


def reserve_of_cpus(host: Host, less: int) -> None:
    host.machine.cpus = 4
    host.limit(vcpu_overcommit=1.0, cpu_reserve=1.0 + less)


def memory(host: Host, less: int) -> None:
    host.machine.memory_mib = RESERVE_MIB + THREE_VMS_MIB - less


def reserve_of_memory(host: Host, less: int) -> None:
    host.machine.memory_mib = RESERVE_MIB + THREE_VMS_MIB
    host.limit(mem_reserve_mib=RESERVE_MIB + less)


def disk(host: Host, less: int) -> None:
    host.machine.disk_free_bytes = (1024 + 1024 + 16 - less) * MIB


def reserve_of_disk(host: Host, less: int) -> None:
    host.machine.disk_free_bytes = (1024 + 1024 + 16) * MIB
    host.limit(disk_reserve_mib=1024 + less)


def watermark(host: Host, less: int) -> None:
    host.machine.disk_high = bool(less)


def uids(host: Host, less: int) -> None:
    host.vmm = VmmSettings(uid_count=3 - less)


CASES: list[tuple[Budget, Callable[[Host, int], None]]] = [
    (Budget.VCPUS, tenants_vcpus),
    (Budget.MEM, tenants_memory),
    (Budget.RUNNING, tenants_running),
    (Budget.INSTANCES, tenants_pool),
    (Budget.POOLS, tenants_pools),
    (Budget.DISK, tenants_disk),
    (Budget.HOST_VCPUS, cpus),
    (Budget.HOST_VCPUS, overcommitted_cpus),
    (Budget.HOST_VCPUS, reserve_of_cpus),
    (Budget.HOST_MEMORY, memory),
    (Budget.HOST_MEMORY, reserve_of_memory),
    (Budget.HOST_DISK, disk),
    (Budget.HOST_DISK, reserve_of_disk),
    (Budget.HOST_DISK_MARK, watermark),
    (Budget.HOST_UIDS, uids),
]


def test_every_budget_has_a_case() -> None:
    assert {budget for budget, _ in CASES} == set(Budget)


def crowded() -> FakeHost:
    machine = seeded()
    machine.tenants["umbra"] = TenantConfig("umbra", machine.tenants["acme"].quotas, OTHER_NET)
    for tenant, pool in (("acme", "web"), ("acme", "api"), ("umbra", "web")):
        machine.pools[tenant, pool] = PoolSpec(pool, tenant, SIZE)
        machine.revisions[tenant, pool] = "r1"
    machine.files[FIRST] = instance_file(FIRST, 9)
    machine.files[API.ref] = instance_file(API.ref, 10)
    machine.files[OTHER] = instance_file(OTHER, 5, net_id=4)
    return machine


async def two_run(worker: MemoryWorker) -> None:
    before: tuple[Request, ...] = (
        UP,
        SetupNetwork("umbra", OTHER_NET),
        StartInstance("acme", "web", "i-0"),
        StartInstance("umbra", "web", "i-0"),
    )
    for each in before:
        reply = await worker.run(each)
        assert reply.code is Code.OK, reply


async def ask(
    arrange: Callable[[Host, int], None], less: int, path: Path
) -> tuple[Reply, MemoryWorker, dict[tuple[str, str], object]]:
    host = Host(crowded())
    free_bytes = host.machine.disk_free_bytes
    arrange(host, less)
    # What the machine has is arranged once the two run, so that it is the third that is refused.
    late = host.machine.disk_free_bytes, host.machine.disk_high
    host.machine.disk_free_bytes, host.machine.disk_high = free_bytes, False
    tenant = host.machine.tenants["acme"]
    host.machine.tenants["acme"] = crowded().tenants["acme"]
    async with memory_worker(path, host.machine, limits=host.limits, vmm=host.vmm) as worker:
        await two_run(worker)
        host.machine.disk_free_bytes, host.machine.disk_high = late
        host.machine.tenants["acme"] = tenant
        before = dict(host.machine.resources)
        reply = await worker.run(host.request)
        assert not worker.host.disk_claims
        assert not worker.host.pending_reservations
        return reply, worker, before


@pytest.mark.parametrize(("budget", "arrange"), CASES, ids=[f.__name__ for _, f in CASES])
async def test_one_unit_less_is_what_refuses(
    budget: Budget, arrange: Callable[[Host, int], None], tmp_path: Path
) -> None:
    fits, *_ = await ask(arrange, 0, tmp_path / "fits")
    refused, worker, before = await ask(arrange, 1, tmp_path / "refused")

    assert fits.code is Code.OK, fits
    assert refused.code is Code.EXHAUSTED, refused
    detail = refused.detail
    assert (detail["budget"], detail["act"]) == (budget.value, "scheduler")
    if budget is not Budget.HOST_DISK_MARK:
        assert detail["used"] + detail["asked"] > detail["limit"], detail
    assert worker.machine.resources == before


@pytest.mark.parametrize(("budget", "arrange"), CASES, ids=[f.__name__ for _, f in CASES])
async def test_a_refusal_names_no_other_tenant(
    budget: Budget, arrange: Callable[[Host, int], None], tmp_path: Path
) -> None:
    reply, *_ = await ask(arrange, 1, tmp_path / "j")

    assert "umbra" not in repr(reply)
    if budget.value.startswith("tenant."):
        named = {"web"} if budget in (Budget.POOLS, Budget.INSTANCES) else {"web/i-0"}
        assert {each["name"] for each in reply.detail["used_by"]} == named
        assert reply.detail["path"] == f"tenant.json: $.quotas.{budget.value.partition('.')[2]}"
        assert next(iter(named)) in str(reply.response)
    elif budget in (Budget.HOST_VCPUS, Budget.HOST_MEMORY, Budget.HOST_DISK):
        assert reply.detail["tenants"] == 2
        own = {Budget.HOST_VCPUS: 1, Budget.HOST_MEMORY: SIZE.mem_mib}
        assert reply.detail["own"] == own.get(budget, SIZE.data_disk_mib)


async def test_of_many_users_the_largest_are_named(tmp_path: Path) -> None:
    machine = seeded()
    host = Host(machine)
    host.quota(max_running=7, max_vcpus=64)
    for n in range(8):
        ref = InstanceRef("acme", "web", f"n-{n}")
        machine.files[ref] = instance_file(ref, 10 + n)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        for n in range(7):
            machine.pools["acme", "web"] = PoolSpec("web", "acme", InstanceResources(1 + n, 128))
            assert (await worker.run(StartInstance("acme", "web", f"n-{n}"))).code is Code.OK
        machine.pools["acme", "web"] = PoolSpec("web", "acme", InstanceResources(40, 128))

        reply = await worker.run(StartInstance("acme", "web", "n-7"))

    used_by = reply.detail["used_by"]
    assert reply.detail["budget"] == "tenant.max_vcpus"
    assert len(used_by) == USERS_MAX
    assert used_by[0] == {"name": "web/n-6", "amount": 7}
    assert [each["amount"] for each in used_by] == [7, 6, 5, 4, 3]


async def test_starts_at_once_share_no_place_of_a_pool(tmp_path: Path) -> None:
    machine = seeded()
    Host(machine).quota(max_instances_per_pool=3, max_pools=1)
    refs = [InstanceRef("acme", pool, f"n-{n}") for n in range(5) for pool in ("web", "api")]
    machine.pools["acme", "api"] = PoolSpec("api", "acme", InstanceResources(1, 128))
    machine.revisions["acme", "api"] = "r1"
    for n, ref in enumerate(refs):
        machine.files[ref] = instance_file(ref, 10 + n)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        ids = [await worker.send(StartInstance("acme", r.pool_id, r.instance_id)) for r in refs]
        replies = [await worker.reply(each) for each in ids]

    started = [r for r, reply in zip(refs, replies, strict=True) if reply.code is Code.OK]
    assert len(started) == 3
    assert len({each.pool_id for each in started}) == 1
    refused = {reply.detail["budget"] for reply in replies if reply.code is not Code.OK}
    assert refused == {"tenant.max_instances_per_pool", "tenant.max_pools"}


@pytest.mark.parametrize("before", [(START, STOP), (START, SLEEP)], ids=["start", "wake"])
async def test_what_exists_when_the_quotas_of_number_are_lowered_goes_on(
    before: tuple[Request, ...], tmp_path: Path
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for each in (UP, *before):
            assert (await worker.run(each)).code is Code.OK
        Host(machine).quota(max_instances_per_pool=0, max_pools=0)

        reply = await worker.run(WAKE if SLEEP in before else START)

        assert reply.code is Code.OK, reply


async def test_a_failed_first_start_takes_no_place_and_a_destroy_gives_it_back(
    tmp_path: Path,
) -> None:
    machine = seeded()
    Host(machine).quota(max_instances_per_pool=1)
    machine.files[FIRST] = instance_file(FIRST, 9)
    first = StartInstance("acme", "web", "i-0")
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        machine.agent_answers = False
        assert (await worker.run(START)).code is Code.UNAVAILABLE
        machine.agent_answers = True

        assert (await worker.run(first)).code is Code.OK
        assert (await worker.run(START)).code is Code.EXHAUSTED
        await worker.run(msgspec.structs.replace(DESTROY, instance_id="i-0"))
        assert (await worker.run(START)).code is Code.OK


REFUSED_ABOVE: dict[str, tuple[tuple[Request, ...], Request]] = {
    "start": ((UP,), START),
    "sleep": ((UP, START), SLEEP),
}
DONE_ABOVE: dict[str, tuple[tuple[Request, ...], Request]] = {
    "forced sleep": ((UP, START), FORCED),
    "wake": ((UP, START, SLEEP), WAKE),
    "stop": ((UP, START), STOP),
    "stop a sleeping one": ((UP, START, SLEEP), STOP),
    "destroy": ((UP, START), DESTROY),
    "destroy a sleeping one": ((UP, START, SLEEP), DESTROY),
    "setup": ((), UP),
    "no-op": ((UP, START), START),
}


@pytest.mark.parametrize("name", [*REFUSED_ABOVE, *DONE_ABOVE])
async def test_above_the_watermark_what_can_wait_is_not_begun(name: str, tmp_path: Path) -> None:
    before, request = (REFUSED_ABOVE | DONE_ABOVE)[name]
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for each in before:
            assert (await worker.run(each)).code is Code.OK
        machine.disk_high = True
        machine.seen.clear()

        reply = await worker.run(request)

        if name in DONE_ABOVE:
            assert reply.code is Code.OK, reply
        else:
            assert reply.code is Code.EXHAUSTED, reply
            assert reply.detail["budget"] == "host.disk_watermark"
            assert machine.seen == []


async def test_an_import_is_not_begun_above_the_watermark_unless_a_sleeper_needs_it(
    tmp_path: Path,
) -> None:
    machine = seeded()

    async def pass_the_mark(moment: str) -> None:
        machine.disk_high = machine.disk_high or moment == "after:reservation"

    async with memory_worker(tmp_path / "j", machine, failpoint=pass_the_mark) as worker:
        await worker.run(UP)

        reply = await worker.run(START)

        assert "artifact acme/web/r1 is admitted again below" in str(reply.response)
        assert "artifact" not in machine.seen
    machine.disk_high = False
    async with memory_worker(tmp_path / "k", machine) as worker:
        for each in (UP, START, SLEEP):
            assert (await worker.run(each)).code is Code.OK
        del machine.resources["artifact", "acme/web/r1"]
        machine.disk_high = True

        assert (await worker.run(WAKE)).code is Code.OK
