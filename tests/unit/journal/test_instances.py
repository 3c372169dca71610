"""What memory keeps of instances and networks equals a scan of them, after any changes."""

import contextlib
from collections import Counter
from ipaddress import IPv4Network
from itertools import product

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from handlers.admission.ranking import Ranking
from handlers.instance.artifact_refs import refers
from handlers.specs import ArtifactSpec
from schemas.decode_error import DecodeError
from schemas.files import offset_of
from schemas.naming import jail_id
from schemas.records import (
    DiskIdentity,
    InstanceRecord,
    NetworkRecord,
    Status,
    Tombstone,
    Usage,
)
from schemas.requests import InstanceRef, TenantNet
from worker.journal.instances import Instances, Tombstones
from worker.journal.networks import Networks

TENANTS = ("acme", "umbra", "zeta")
POOLS = ("web", "api")
REFS = [
    InstanceRef(tenant, pool, f"i-{n}") for tenant in TENANTS for pool in POOLS for n in range(2)
]
REVISIONS = (None, "aa", "bb")

records = st.builds(
    InstanceRecord,
    ref=st.sampled_from(REFS),
    status=st.sampled_from(Status),
    since_ms=st.just(1),
    launch=st.integers(0, 3),
    uid_slot=st.none() | st.integers(0, 5),
    offset=st.none() | st.integers(3, 6),
    revision=st.sampled_from(REVISIONS),
    vcpus=st.integers(0, 4),
    mem_mib=st.integers(0, 512),
    vmm_version=st.sampled_from(("", "1.12.1", "1.15.1")),
    disk=st.none() | st.builds(DiskIdentity, dev=st.just(1), ino=st.just(2), size_bytes=st.just(7)),
)


def subnet_around(address: int, length: int) -> str:
    return str(IPv4Network((address, length), strict=False))


subnets = st.builds(subnet_around, st.integers(0x0AF00000, 0x0AF0FFFF), st.integers(14, 30))


def allowed(record: InstanceRecord, known: dict[InstanceRef, InstanceRecord]) -> bool:
    """The file's unique columns: uid slot, and a tenant's offset of those that hold it."""
    others = [each for each in known.values() if each.ref != record.ref]
    return not any(
        (record.uid_slot is not None and other.uid_slot == record.uid_slot)
        or (
            record.holds_offset
            and other.holds_offset
            and record.offset is not None
            and (other.ref.tenant_id, other.offset) == (record.ref.tenant_id, record.offset)
        )
        for other in others
    )


def summed(found: list[InstanceRecord]) -> Usage:
    live = [each for each in found if each.uid_slot is not None]
    return Usage(
        len(live),
        sum(each.vcpus for each in live),
        sum(each.mem_mib for each in live),
        sum(each.disk.size_bytes for each in found if each.disk is not None),
    )


def shares(ranking: Ranking) -> dict[str, int]:
    return dict(ranking.top(len(ranking)))


def amounts(resource: str, found: list[InstanceRecord], *, by_tenant: bool) -> dict[str, int]:
    totals = Counter[str]()
    for each in found:
        ref = each.ref
        name = ref.tenant_id if by_tenant else f"{ref.pool_id}/{ref.instance_id}"
        totals[name] += getattr(each.usage, resource)
    return {name: amount for name, amount in totals.items() if amount}


@given(st.lists(records | st.sampled_from(REFS), max_size=60))
def test_instances_answer_as_a_scan_would(changes: list[InstanceRecord | InstanceRef]) -> None:
    index, known = Instances(), dict[InstanceRef, InstanceRecord]()
    for change in changes:
        if isinstance(change, InstanceRef):
            index.drop(change)
            known.pop(change, None)
        elif allowed(change, known):
            index.put(change)
            known[change.ref] = change

    found = list(known.values())
    assert set(index.all()) == set(found)
    assert len(index) == len(found)
    assert index.usage() == summed(found)
    assert index.statuses() == Counter(each.status for each in found)
    for tenant in TENANTS:
        mine = [each for each in found if each.ref.tenant_id == tenant]
        assert set(index.of(tenant)) == set(mine)
        assert index.usage(tenant) == summed(mine)
        for offset in range(3, 7):
            having = [each for each in mine if each.holds_offset and each.offset == offset]
            assert index.with_offset(tenant, offset) == next(iter(having), None)
        pools = Counter(each.ref.pool_id for each in mine if not each.status.never_started)
        assert shares(index.pools(tenant)) == pools
        for resource in Usage.__struct_fields__:
            ranking = index.ranking(resource, tenant)
            assert shares(ranking) == amounts(resource, mine, by_tenant=False)
            assert [each.amount for each in ranking.top(9)] == sorted(
                shares(ranking).values(), reverse=True
            )
    for resource in Usage.__struct_fields__:
        assert shares(index.ranking(resource)) == amounts(resource, found, by_tenant=True)
    live_or_asleep = [r for r in found if r.holds_host or r.status is Status.SLEEPING]
    assert index.vmm_versions() == Counter(
        (each.vmm_version, "running" if each.holds_host else "sleeping") for each in live_or_asleep
    )
    assert index.slot_count() == len([each for each in found if each.uid_slot is not None])
    for slot in range(6):
        slots = [each.ref for each in found if each.uid_slot == slot]
        assert index.with_slot(slot) == next(iter(slots), None)
    for revision in ("aa", "bb"):
        for tenant, pool in product(TENANTS, POOLS):
            key = ArtifactSpec(tenant, pool, revision).key
            assert index.refers(key) == any(refers(each, key) for each in found)
    for ref in REFS:
        tenant_id = ref.tenant_id if ref in known else None
        assert index.tenant_of_jail(jail_id(ref, 7)) == tenant_id
        assert index.get(ref) == known.get(ref)


tombstones = st.builds(
    Tombstone,
    ref=st.sampled_from(REFS),
    at_ms=st.integers(0, 9),
    launch=st.just(1),
    kept_volumes=st.booleans(),
)


@given(st.lists(tombstones | st.sampled_from(REFS), max_size=40))
def test_kept_volumes_are_those_of_a_scan(changes: list[Tombstone | InstanceRef]) -> None:
    index, known = Tombstones(), dict[InstanceRef, Tombstone]()
    for change in changes:
        if isinstance(change, InstanceRef):
            index.drop(change)
            known.pop(change, None)
        else:
            index.put(change)
            known[change.ref] = change

    assert set(index.all()) == set(known.values())
    for tenant in TENANTS:
        kept = {each for each in known.values() if each.ref.tenant_id == tenant}
        assert set(index.kept(tenant)) == {each for each in kept if each.kept_volumes}


def offsets(net: TenantNet) -> list[int]:
    """Those that an instance of the tenant may have."""
    subnet = IPv4Network(net.ipv4_subnet)
    found: list[int] = []
    for offset in range(min(256, subnet.num_addresses)):
        with contextlib.suppress(DecodeError):
            found.append(offset_of(str(subnet[offset]), net))
    return found


@given(
    st.lists(st.tuples(st.integers(1, 40), subnets | st.none()), max_size=40),
    st.lists(subnets, min_size=1, max_size=5),
)
def test_networks_answer_as_a_scan_would(
    changes: list[tuple[int, str | None]], asked: list[str]
) -> None:
    """Also if the subnets of two tenants overlap, as an older journal's may."""
    index, known = Networks(), dict[str, NetworkRecord]()
    for net_id, subnet in changes:
        tenant_id = f"t{net_id}"
        if subnet is None:
            index.drop(tenant_id)
            known.pop(tenant_id, None)
            continue
        gateway = str(IPv4Network(subnet)[net_id % 3 + 1])
        net = TenantNet(net_id, subnet, gateway, f"br-tenant-{net_id}")
        record = NetworkRecord(tenant_id=tenant_id, net=net, status="up", since_ms=1)
        index.put(record)
        known[tenant_id] = record

    assert set(index.all()) == set(known.values())
    assert len(index) == len(known)
    assert index.address_count == sum(len(offsets(each.net)) for each in known.values())
    for net_id in range(1, 41):
        assert index.with_id(net_id) == known.get(f"t{net_id}")
    for wanted in map(IPv4Network, asked):
        found = index.overlapping(wanted)
        scanned = [r for r in known.values() if IPv4Network(r.net.ipv4_subnet).overlaps(wanted)]
        assert set(found) == set(scanned)
        assert len(found) == len(scanned)


def test_a_put_of_a_slot_that_moved_does_not_lose_the_new_holder() -> None:
    index = Instances()
    first = InstanceRecord(ref=REFS[0], status=Status.RUNNING, since_ms=1, uid_slot=3)
    index.put(first)
    index.put(replace(first, ref=REFS[1]))

    index.put(replace(first, uid_slot=None))

    assert index.with_slot(3) == REFS[1]
