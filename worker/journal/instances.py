"""All instances in memory, with what a command asks of all of them: never by looking at each.

Every put and drop keeps the answers up to date, so that a command costs the same on a host with
one instance and with thousands. Values are as of the last commit.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TypeVar

from handlers.admission.ranking import Ranking
from handlers.specs import ArtifactSpec
from schemas import naming
from schemas.records import InstanceRecord, Status, Tombstone, Usage
from schemas.requests import InstanceRef

NOTHING = Usage()
NOBODY = Ranking()
RESOURCES = Usage.__struct_fields__
UNKNOWN = InstanceRef("", "", "")
K = TypeVar("K")


class Instances:
    """Records by instance. What is not a lookup by key is kept as a sum or an index."""

    def __init__(self) -> None:
        self._records: dict[InstanceRef, InstanceRecord] = {}
        self._of_tenant: dict[str, dict[InstanceRef, InstanceRecord]] = {}
        self._usage: dict[str, Usage] = {}
        self._total = NOTHING
        self._slots: dict[int, InstanceRef] = {}
        self._offsets: dict[tuple[str, int], InstanceRef] = {}
        self._revisions: Counter[str] = Counter()
        self._statuses: Counter[Status] = Counter()
        self._jails: dict[str, str] = {}
        self._tenants = {each: Ranking() for each in RESOURCES}
        self._users: dict[str, dict[str, Ranking]] = {}
        self._pools: dict[str, Ranking] = {}
        self._versions: Counter[tuple[str, str]] = Counter()
        self._set_aside = False

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: InstanceRecord) -> None:
        ref, old = record.ref, self._records.get(record.ref)
        prefix, usage, revision = naming.jail_id_prefix(ref), record.usage, _revision(record)
        self._uncount(ref)
        self._records[ref] = record
        self._of_tenant.setdefault(ref.tenant_id, {})[ref] = record
        self._jails[prefix] = ref.tenant_id
        self._add(ref, usage if old is None else usage - old.usage)
        self._statuses[record.status] += 1
        if record.uid_slot is not None:
            self._slots[record.uid_slot] = ref
        if record.holds_offset and record.offset is not None:
            self._offsets[ref.tenant_id, record.offset] = ref
        if revision is not None:
            self._revisions[revision] += 1
        if (version := _vmm_version(record)) is not None:
            self._versions[version] += 1
        if record.exists:
            self._pools.setdefault(ref.tenant_id, Ranking()).add(ref.pool_id, 1)

    def drop(self, ref: InstanceRef) -> None:
        """Absent is success."""
        if (old := self._records.get(ref)) is None:
            return
        self._uncount(ref)
        self._add(ref, NOTHING - old.usage)
        del self._records[ref], self._jails[naming.jail_id_prefix(ref)]
        mine = self._of_tenant[ref.tenant_id]
        del mine[ref]
        if not mine:
            del self._of_tenant[ref.tenant_id]
            self._usage.pop(ref.tenant_id, None)
            self._users.pop(ref.tenant_id, None)
            self._pools.pop(ref.tenant_id, None)

    def set_aside(self, slot: int | None, ref: InstanceRef | None) -> None:
        """There is one more, whose record cannot be read: its uid slot is taken, and it may refer
        to any revision."""
        self._set_aside = True
        if slot is not None:
            self._slots[slot] = ref or UNKNOWN

    # -- answers -------------------------------------------------------------------------------

    def get(self, ref: InstanceRef) -> InstanceRecord | None:
        return self._records.get(ref)

    def all(self) -> Collection[InstanceRecord]:
        return self._records.values()

    def of(self, tenant_id: str) -> Collection[InstanceRecord]:
        return self._of_tenant.get(tenant_id, {}).values()

    def usage(self, tenant_id: str | None = None) -> Usage:
        """Of a tenant, or of all."""
        return self._total if tenant_id is None else self._usage.get(tenant_id, NOTHING)

    def ranking(self, resource: str, tenant_id: str | None = None) -> Ranking:
        """Who takes up most of one field of `Usage`: the tenant's instances, or all tenants."""
        if tenant_id is None:
            return self._tenants[resource]
        return self._users.get(tenant_id, {}).get(resource, NOBODY)

    def pools(self, tenant_id: str) -> Ranking:
        """The tenant's pools that have instances on this host, by their number."""
        return self._pools.get(tenant_id, NOBODY)

    def vmm_versions(self) -> Mapping[tuple[str, str], int]:
        """How many instances run or sleep by each version of Firecracker: by version and
        `running` or `sleeping`. The version "" is that of records which do not say."""
        return self._versions

    def offset_count(self) -> int:
        """How many addresses instances have, live or sleeping."""
        return len(self._offsets)

    def slot_count(self) -> int:
        """How many uids instances have."""
        return len(self._slots)

    def with_slot(self, slot: int) -> InstanceRef | None:
        """The instance that has the uid slot."""
        return self._slots.get(slot)

    def with_offset(self, tenant_id: str, offset: int) -> InstanceRecord | None:
        """The tenant's instance, live or sleeping, that has the address offset."""
        ref = self._offsets.get((tenant_id, offset))
        return None if ref is None else self._records[ref]

    def refers(self, revision: str) -> bool:
        """Whether any refers to the artifact revision of this key; see `artifact_refs.refers`."""
        return self._set_aside or revision in self._revisions

    def statuses(self) -> Mapping[Status, int]:
        """How many have each status."""
        return self._statuses

    def tenant_of_jail(self, jail_id: str) -> str | None:
        """The tenant of the instance whose launches have such jail IDs."""
        return self._jails.get(f"{jail_id.rpartition('-')[0]}-")

    # -- keeping the sums ----------------------------------------------------------------------

    def _add(self, ref: InstanceRef, usage: Usage) -> None:
        if usage == NOTHING:
            return
        tenant_id, name = ref.tenant_id, f"{ref.pool_id}/{ref.instance_id}"
        self._usage[tenant_id] = self._usage.get(tenant_id, NOTHING) + usage
        self._total += usage
        users = self._users.get(tenant_id)
        if users is None:
            users = self._users[tenant_id] = {each: Ranking() for each in RESOURCES}
        for resource in RESOURCES:
            amount = getattr(usage, resource)
            users[resource].add(name, amount)
            self._tenants[resource].add(tenant_id, amount)

    def _uncount(self, ref: InstanceRef) -> None:
        """Take a record out of the indices and counts; of an instance without one, nothing."""
        old = self._records.get(ref)
        if old is None:
            return
        _take(self._statuses, old.status)
        if old.uid_slot is not None and self._slots.get(old.uid_slot) == ref:
            del self._slots[old.uid_slot]
        if old.offset is not None and self._offsets.get((ref.tenant_id, old.offset)) == ref:
            del self._offsets[ref.tenant_id, old.offset]
        if (revision := _revision(old)) is not None:
            _take(self._revisions, revision)
        if (version := _vmm_version(old)) is not None:
            _take(self._versions, version)
        if old.exists:
            self._pools[ref.tenant_id].add(ref.pool_id, -1)


class Tombstones:
    """What remains of destroyed instances; those with kept volumes also by tenant."""

    def __init__(self) -> None:
        self._records: dict[InstanceRef, Tombstone] = {}
        self._kept: dict[str, dict[InstanceRef, Tombstone]] = {}

    def put(self, tombstone: Tombstone) -> None:
        self.drop(tombstone.ref)
        self._records[tombstone.ref] = tombstone
        if tombstone.kept_volumes:
            self._kept.setdefault(tombstone.ref.tenant_id, {})[tombstone.ref] = tombstone

    def drop(self, ref: InstanceRef) -> None:
        """Absent is success."""
        self._records.pop(ref, None)
        kept = self._kept.get(ref.tenant_id, {})
        if kept.pop(ref, None) is not None and not kept:
            del self._kept[ref.tenant_id]

    def get(self, ref: InstanceRef) -> Tombstone | None:
        return self._records.get(ref)

    def all(self) -> Collection[Tombstone]:
        return self._records.values()

    @property
    def prunable_count(self) -> int:
        """Those without kept volumes; the cost is one of tenants that kept some."""
        return len(self._records) - sum(map(len, self._kept.values()))

    def kept(self, tenant_id: str) -> Collection[Tombstone]:
        """The tenant's with kept volumes."""
        return self._kept.get(tenant_id, {}).values()


def _revision(record: InstanceRecord) -> str | None:
    """The key of the revision that it refers to; an instance being destroyed does not."""
    return None if record.status is Status.DESTROYING else ArtifactSpec.key_of(record)


def _vmm_version(record: InstanceRecord) -> tuple[str, str] | None:
    if record.holds_host:
        return record.vmm_version, "running"
    return (record.vmm_version, "sleeping") if record.status is Status.SLEEPING else None


def _take(counts: Counter[K], key: K) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
