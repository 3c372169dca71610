"""What counts as an orphan: hostd's by its mark, in no record; and what keeps one for now."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from handlers.claims.orphan import Orphan
from handlers.claims.unrecorded import UnrecordedVmm, VmmProcess
from handlers.host.inventory import Inventory
from handlers.mechanism import StepRow
from schemas.records import InstanceRecord, NetworkRecord, Status
from schemas.requests import InstanceRef
from tests.constants import NET, REF
from worker.reconcile.orphans import (
    NOT_REMOVED,
    REMOVED,
    Known,
    busy_names,
    counts_of,
    find_orphans,
    instance_of_files,
    net_id_of,
)

LIVE = InstanceRecord(
    ref=REF,
    status=Status.RUNNING,
    since_ms=1,
    launch=2,
    uid_slot=0,
    offset=5,
    net=NET,
    revision="r1",
)
STOPPED = replace(LIVE, status=Status.STOPPED, uid_slot=None)
NETWORK = NetworkRecord(tenant_id="acme", net=NET, status="up", since_ms=1)
OTHER = InstanceRef("umbra", "web", "i-9")
OWNED = Inventory(
    jails=(LIVE.jail_id,),
    taps=("tn3i5",),
    bridges=("br-tenant-3",),
    nft=(
        "bridge guests tn3i5",
        "bridge pins tn3i5 . 02:fc:00:03:00:05 . 10.240.3.5",
        "inet gateways br-tenant-3 . 10.240.3.1",
    ),
    cgroups=(f"hostd/acme/{LIVE.jail_id}",),
    artifacts=("acme/web/r1",),
)
STRAY = Inventory(
    jails=("0123456789ab-1",),
    taps=("tn4i9",),
    bridges=("br-tenant-4",),
    nft=("bridge pins tn4i9 . 02:fc:00:04:00:09 . 10.240.4.9", "inet tenants br-tenant-4"),
    cgroups=("hostd/acme/0123456789ab-1", "hostd/empty"),
    snapshots=("acme/web/i-1/1",),
    artifacts=("acme/web/r0",),
    temp=("/s/artifacts/acme/web/.r9.part", "/s/snapshots/acme/web/i-1/7", "/s/x.part"),
)


def known(
    *records: InstanceRecord,
    rows: Sequence[StepRow] = (),
    busy: frozenset[str] = frozenset(),
    unrecorded: Sequence[UnrecordedVmm] = (),
    revisions: frozenset[str] = frozenset(),
) -> Known:
    return Known(
        instances=records,
        networks=[NETWORK],
        rows=rows,
        busy=busy,
        unrecorded=unrecorded,
        revisions=revisions,
        data="/d",
        state="/s",
    )


def test_each_kind_of_the_inventory_is_removed_or_there_is_a_reason_not_to() -> None:
    kinds = set(Inventory().counts)

    assert set(REMOVED) | set(NOT_REMOVED) == kinds
    assert set(REMOVED) & set(NOT_REMOVED) == set()
    assert {orphan.kind for orphan in find_orphans(STRAY, known(LIVE))} == set(REMOVED)


def test_what_belongs_to_a_record_is_not_an_orphan() -> None:
    assert find_orphans(OWNED, known(LIVE)) == {}


def test_an_instance_at_rest_owns_its_artifact_alone() -> None:
    found = counts_of(find_orphans(OWNED, known(STOPPED)))

    assert found == {"jails": 1, "taps": 1, "nft": 2, "cgroups": 1}


def test_all_else_is_an_orphan_that_nothing_keeps() -> None:
    found = find_orphans(STRAY, known(STOPPED))

    assert found == {Orphan(kind, name): "" for kind, names in each_kind(STRAY) for name in names}


def each_kind(inventory: Inventory) -> list[tuple[str, tuple[str, ...]]]:
    return [(kind, getattr(inventory, kind)) for kind in inventory.counts]


@pytest.mark.parametrize(
    "record",
    [
        replace(LIVE, launch=1, snapshot=1, status=Status.SLEEPING, uid_slot=None),
        replace(LIVE, launch=2, snapshot=1),
        replace(LIVE, launch=2, before=STOPPED),
        replace(LIVE, launch=1),
        replace(LIVE, ref=OTHER),
    ],
    ids=["asleep", "woken", "command-incomplete", "its-own-launch", "no-record"],
)
def test_a_snapshot_that_may_be_needed_is_no_orphan(record: InstanceRecord) -> None:
    snapshots = Inventory(snapshots=("acme/web/i-1/1",))

    assert find_orphans(snapshots, known(record)) == {}


@pytest.mark.parametrize(
    ("record", "owned"),
    [
        (replace(LIVE, snapshot=7, consumed=True), True),
        (replace(LIVE, status=Status.UNKNOWN), True),
        (replace(STOPPED, before=STOPPED), True),
        (STOPPED, False),
        (replace(LIVE, ref=OTHER), False),
    ],
    ids=["woken", "unknown", "command-incomplete", "at-rest", "another"],
)
def test_the_files_that_a_live_vm_may_map_are_no_orphans_without_its_jail(
    record: InstanceRecord, owned: bool
) -> None:
    memory = "/s/snapshots/acme/web/i-1/7"

    found = find_orphans(Inventory(temp=(memory,)), known(record))

    assert found == ({} if owned else {Orphan("temp", memory): ""})


def test_the_files_that_a_vmm_without_a_record_may_map_are_kept() -> None:
    process = VmmProcess(77, 1, 2_000_000_009, STOPPED.jail_id, "x", 1)
    memory = Inventory(temp=("/s/snapshots/acme/web/i-1/7",))

    found = find_orphans(memory, known(unrecorded=[UnrecordedVmm(process, ())]))

    assert ["process 77" in reason for reason in found.values()] == [True]


@pytest.mark.parametrize("name", ["acme/web/i-1/x", "acme/web/i-1/-1", "A/web/i-1/1", "a/b/c/1/2"])
def test_a_foreign_name_among_the_snapshots_is_left_alone(name: str) -> None:
    assert find_orphans(Inventory(snapshots=(name,)), known(STOPPED)) == {}


def test_a_snapshot_below_a_later_launch_can_never_be_woken() -> None:
    found = find_orphans(Inventory(snapshots=("acme/web/i-1/1",)), known(STOPPED))

    assert found == {Orphan("snapshots", "acme/web/i-1/1"): ""}


def test_a_revision_that_something_without_a_record_refers_to_is_no_orphan() -> None:
    artifacts = Inventory(artifacts=("acme/web/r0",))

    assert find_orphans(artifacts, known(revisions=frozenset({"acme/web/r0"}))) == {}


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (StepRow("jail", "0123456789ab-1", False), "jails cgroups"),
        (StepRow("tap", "tn4i9", False), "taps nft"),
        (StepRow("pin", "tn4i9,02:fc:00:04:00:09,10.240.4.9", False), "taps nft"),
        (StepRow("bridge", "br-tenant-4", False), "bridges nft"),
        (StepRow("tenant_rules", "4,10.240.4.0/24,10.240.4.1", False), "bridges nft"),
        (StepRow("cgroup", "acme/0123456789ab-1", False), "cgroups jails"),
        (StepRow("snapshot_draft", "acme/web/i-1#1", False), "snapshots"),
    ],
    ids=lambda value: value.mechanism if isinstance(value, StepRow) else "",
)
def test_what_a_row_of_the_step_log_names_is_kept(row: StepRow, kept: str) -> None:
    found = find_orphans(STRAY, known(LIVE, rows=[row]))

    held = {orphan.kind for orphan, reason in found.items() if reason.startswith("a command is")}
    assert held == set(kept.split())


def test_what_a_vmm_without_a_record_uses_is_kept() -> None:
    process = VmmProcess(77, 1, 2_000_000_009, "0123456789ab-1", "x", 1)

    found = find_orphans(STRAY, known(unrecorded=[UnrecordedVmm(process, ("tn4i9",))]))

    held = {orphan for orphan, reason in found.items() if "process 77" in reason}
    assert counts_of(held) == {"jails": 1, "taps": 1, "nft": 2, "bridges": 1, "cgroups": 1}


def test_files_of_a_tenant_with_an_unfinished_command_are_kept() -> None:
    found = find_orphans(STRAY, known(STOPPED, busy=busy_names([REF], [])))

    held = {orphan.name for orphan, reason in found.items() if "unfinished" in reason}
    assert held == {"acme/web/r0", "acme/web/i-1/1", *STRAY.temp}


def test_a_jail_of_an_instance_with_an_unfinished_command_is_kept() -> None:
    jail = STOPPED.jail_id

    found = find_orphans(Inventory(jails=(jail,)), known(STOPPED, busy=busy_names([REF], [])))

    assert found == {Orphan("jails", jail): "a command of its instance is unfinished"}


def test_whose_files_and_interfaces_are_is_read_from_their_names() -> None:
    here = known()

    assert instance_of_files(Orphan("snapshots", "acme/web/i-1/1"), here) == REF
    assert instance_of_files(Orphan("temp", "/s/snapshots/acme/web/i-1/7"), here) == REF
    assert instance_of_files(Orphan("temp", "/s/artifacts/acme/web/.x.part"), here) is None
    assert instance_of_files(Orphan("temp", "/s/x.part"), here) is None
    names = ("tn4i9", "br-tenant-4", "eth0")
    assert [net_id_of(Orphan("taps", name)) for name in names] == [4, 4, None]
    assert net_id_of(Orphan("nft", "inet gateways br-tenant-7 . 10.0.0.1")) == 7
    assert net_id_of(Orphan("jails", "0123456789ab-1")) is None
