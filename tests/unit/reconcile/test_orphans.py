"""What counts as an orphan: hostd's by its mark, in no record, found twice."""

from handlers.host.inventory import Inventory
from schemas.records import InstanceRecord, NetworkRecord, Status
from schemas.requests import InstanceRef
from tests.constants import NET
from worker.reconcile.orphans import count_in_both, unowned

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


def test_what_belongs_to_a_record_is_not_an_orphan() -> None:
    inventory = Inventory(
        jails=(LIVE.jail_id,),
        taps=("tn3i5",),
        bridges=("br-tenant-3",),
        cgroups=(f"hostd/acme/{LIVE.jail_id}",),
        artifacts=("/s/artifacts/acme/web/r1",),
    )

    assert unowned(inventory, [LIVE], [NETWORK]) == set()


def test_anything_else_is_an_orphan_once_two_passes_found_it() -> None:
    inventory = Inventory(
        jails=("0123456789ab-1",),
        taps=("tn3i9",),
        bridges=("br-tenant-4",),
        cgroups=("hostd/acme/0123456789ab-1",),
        artifacts=("/s/artifacts/acme/web/r0",),
    )

    found = unowned(inventory, [LIVE], [NETWORK])

    assert count_in_both(set(), found) == {}
    assert count_in_both(found, found) == dict.fromkeys(
        ("jails", "taps", "bridges", "cgroups", "artifacts"), 1
    )
