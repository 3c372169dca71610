"""A journal with thousands of running instances of hundreds of tenants, for tests of scale."""

import asyncio

from schemas.records import InstanceRecord, NetworkRecord, Status, VmmIdentity
from schemas.requests import InstanceRef, TenantNet
from tests.fakes.host import BOOT_ID
from worker.journal.journal import Journal

FIRST_NET, FIRST_SLOT, FIRST_PID = 100, 1000, 100_000
FIRST_OFFSET = 10


def net_of(tenant: int) -> TenantNet:
    number = FIRST_NET + tenant
    subnet = f"10.{240 + number // 256}.{number % 256}"
    return TenantNet(number, f"{subnet}.0/24", f"{subnet}.1", f"br-tenant-{number}")


def running(number: int, tenants: int) -> InstanceRecord:
    """One of many instances, of one of so many tenants."""
    tenant = number % tenants
    vmm = VmmIdentity(FIRST_PID + number, 1, 1, 1, f"hostd/t-{tenant}/j", BOOT_ID)
    return InstanceRecord(
        ref=InstanceRef(f"t-{tenant}", "web", f"i-{number}"),
        status=Status.RUNNING,
        since_ms=1,
        launch=1,
        uid_slot=FIRST_SLOT + number,
        offset=FIRST_OFFSET + number // tenants,
        net=net_of(tenant),
        revision="r1",
        vcpus=1,
        mem_mib=128,
        vmm=vmm,
    )


async def crowd(journal: Journal, instances: int, tenants: int) -> None:
    """Put so many running instances, and their tenants' networks, on record."""
    networks = [
        NetworkRecord(tenant_id=f"t-{each}", net=net_of(each), status="up", since_ms=1)
        for each in range(tenants)
    ]
    await asyncio.gather(*map(journal.records.put_network, networks))
    records = [running(each, tenants) for each in range(instances)]
    await asyncio.gather(*map(journal.records.put_instance, records))
