"""An address goes from one instance to the next: the end of the first leaves the second alone."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.errors import HostFault
from schemas.codes import Code
from schemas.files import TenantConfig
from schemas.records import Status
from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    SetupNetwork,
    StartInstance,
    TeardownNetwork,
)
from tests.constants import DESTROY, NET, REF, SLEEP, START, STOP
from tests.fakes.host import FakeHost, instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker

OFFSET = 5
UP = SetupNetwork("acme", NET)
NEXT = InstanceRef("acme", "web", "i-2")
START_NEXT = StartInstance(NEXT.tenant_id, NEXT.pool_id, NEXT.instance_id)


def two_instances() -> FakeHost:
    machine = seeded()
    machine.files[NEXT] = instance_file(NEXT, OFFSET)
    return machine


def ports(machine: FakeHost) -> set[tuple[str, str]]:
    """TAPs, pins and flows."""
    found = {key for key in machine.resources if key[0] in {"tap", "pin"}}
    return found | {("flow", address) for address in machine.flows}


async def ok(worker: MemoryWorker, *requests: object) -> None:
    for request in requests:
        reply = await worker.run(request)  # type: ignore[arg-type]
        assert reply.code is Code.OK, reply


@pytest.mark.parametrize("ending", ["stopped", "failed"])
async def test_a_destroy_leaves_the_port_of_the_next_instance(tmp_path: Path, ending: str) -> None:
    machine = two_instances()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await ok(worker, UP, START, STOP)
        if ending == "failed":
            record = replace(worker.record(), status=Status.FAILED)
            await worker.journal.records.put_instance(record)
        await ok(worker, START_NEXT)
        machine.flows.add(instance_file(NEXT, OFFSET).net.guest_ip)
        before = ports(machine)
        assert {kind for kind, _ in before} == {"tap", "pin", "flow"}

        await ok(worker, DESTROY)

        assert ports(machine) == before


async def test_the_address_of_a_sleeper_is_free_once_its_destroy_is_complete(
    tmp_path: Path,
) -> None:
    machine = two_instances()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await ok(worker, UP, START, SLEEP)
        machine.flows.add(instance_file(REF, OFFSET).net.guest_ip)
        machine.fail["flush_conntrack"] = HostFault("injected")
        assert (await worker.run(DESTROY)).code is Code.HOST_FAULT
        machine.fail.clear()
        assert (await worker.run(START_NEXT)).code is Code.CONFLICT

        await ok(worker, DESTROY)

        assert machine.flows == set()
        await ok(worker, START_NEXT)


@pytest.mark.parametrize("end", [STOP, DESTROY], ids=["Stop", "Destroy"])
async def test_a_sleeper_whose_network_was_given_away_touches_nothing_of_its_new_tenant(
    tmp_path: Path, end: object
) -> None:
    machine = two_instances()
    other = InstanceRef("beta", "web", "i-1")
    machine.tenants["beta"] = TenantConfig("beta", machine.tenants["acme"].quotas, NET)
    machine.pools["beta", "web"] = replace(machine.pools["acme", "web"], tenant_id="beta")
    machine.revisions["beta", "web"] = "r1"
    machine.files[other] = instance_file(other, OFFSET)
    async with memory_worker(tmp_path / "j", machine) as worker:
        await ok(worker, UP, START, SLEEP, TeardownNetwork("acme", NET))
        await ok(worker, SetupNetwork("beta", NET), StartInstance("beta", "web", "i-1"))
        machine.flows.add(instance_file(other, OFFSET).net.guest_ip)
        before = ports(machine)

        await ok(worker, end)

        assert ports(machine) == before
        await ok(worker, DestroyInstance("beta", "web", "i-1", wipe_volumes=True))
        assert ports(machine) == set()
