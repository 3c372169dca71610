"""What counts as an orphan: ours by its mark, known to no record, seen twice."""

from handlers.host.inventory import Inventory
from schemas.records import InstanceRecord, NetworkRecord, Status
from schemas.requests import InstanceRef, TenantNet
from worker.reconcile.orphans import counted, unowned

NET = TenantNet(3, "10.240.3.0/24", "10.240.3.1", "br-tenant-3")
LIVE = InstanceRecord(
    ref=InstanceRef("acme", "web", "i-1"),
    status=Status.RUNNING,
    since_ms=1,
    launch=2,
    uid_slot=0,
    offset=5,
    net=NET,
    revision="r1",
)
NETWORK = NetworkRecord(tenant_id="acme", net=NET, status="up", since_ms=1)


def test_what_a_record_stands_for_is_no_orphan() -> None:
    inventory = Inventory(
        jails=(LIVE.jail_id,),
        taps=("tn3i5",),
        bridges=("br-tenant-3",),
        cgroups=(f"hostd/acme/{LIVE.jail_id}",),
        artifacts=("/s/artifacts/acme/web/r1",),
    )

    assert unowned(inventory, [LIVE], [NETWORK]) == set()


def test_all_else_is_one_once_it_was_seen_twice() -> None:
    inventory = Inventory(
        jails=("0123456789ab-1",),
        taps=("tn3i9",),
        bridges=("br-tenant-4",),
        cgroups=("hostd/acme/0123456789ab-1",),
        artifacts=("/s/artifacts/acme/web/r0",),
    )

    found = unowned(inventory, [LIVE], [NETWORK])

    assert counted(set(), found) == {}
    assert counted(found, found) == dict.fromkeys(
        ("jails", "taps", "bridges", "cgroups", "artifacts"), 1
    )
