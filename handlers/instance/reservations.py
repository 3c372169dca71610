"""Admission control: what a launch is allocated before anything is made on the host.

Launch number, uid slot, address offset, CPUs, memory and quotas are decided at once, without an
await between check and allocation, and committed to the journal as the first step of the command.
The launch's claim of disk space, made before (`disk_admission.py`), is held meanwhile: a launch
gets all of it or nothing. Undo restores the instance's record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from msgspec.structs import replace

from handlers.admission.budgets import (
    USERS_MAX,
    Asked,
    Budget,
    memory_capacity_mib,
    shared_with,
    vcpu_capacity,
)
from handlers.admission.ranking import Share
from handlers.claims.look import look_for_unrecorded
from handlers.errors import Conflict
from handlers.instance.artifact_refs import collect_revision
from handlers.interfaces import Host
from handlers.mechanism import Durability
from handlers.network_names import Names
from schemas.files import TenantQuota
from schemas.naming import jail_id as jail_id_of
from schemas.naming import parse_ref
from schemas.records import InstanceRecord, Status, Usage
from schemas.requests import InstanceRef, TenantNet

NAMES: Final = {
    Budget.VCPUS: "vCPUs",
    Budget.MEM: "memory in MiB",
    Budget.RUNNING: "running instances",
    Budget.POOLS: "pools",
    Budget.INSTANCES: "instances in the pool",
}


@dataclass(frozen=True, slots=True)
class ReservationSpec:
    """`before` is the record that undo restores; `offset` and `net` come from validated files;
    `newest_launch` is the highest number of which the host has a trace; `vmm_version` that of the
    Firecracker to launch."""

    command_id: str
    before: InstanceRecord
    status: Status
    now_ms: int
    quota: TenantQuota
    net: TenantNet
    offset: int
    revision: str
    newest_launch: int
    vcpus: int
    mem_mib: int
    agent_port: int | None
    vmm_version: str

    @property
    def key(self) -> str:
        return str(self.before.ref)


class Reservations:
    """Records of instances being launched; `host.pending_reservations` has the uncommitted ones."""

    name: ClassVar[str] = "reservation"
    durability: ClassVar[Durability] = Durability.IMPLIED
    swept: ClassVar[bool] = False

    def __init__(self, host: Host) -> None:
        self._host = host

    async def exists(self, key: str) -> bool:
        record = self._host.records.instance(parse_ref(key))
        return record is not None and record.before is not None

    async def ensure(self, spec: ReservationSpec) -> InstanceRecord:
        """Reserve, or return what an earlier run of the same command reserved.

        Raises:
            Exhausted: the tenant's quota, this host's CPUs, memory or uid range is used up; its
                detail says which, how large it is and who uses it.
            Conflict: another instance of the tenant, live or sleeping, has the address; or a VMM
                of this instance runs that the journal does not know.
        """
        now = self._host.records.instance(spec.before.ref)
        if now is not None and now.before is not None and now.command_id == spec.command_id:
            return now
        await self._look_again(spec)
        record = self._decide(spec)
        self._host.pending_reservations[record.ref] = record
        try:
            # Not synced by itself: the launch's rows are, before anything of it is made.
            await self._host.records.put_instance(record)
        except BaseException:
            self._host.warm.give_back(record.jail_id)
            raise
        finally:
            del self._host.pending_reservations[record.ref]
        return record

    async def remove(self, key: str) -> None:
        """Restore the record of before the command; the launch number stays used."""
        record = self._host.records.instance(parse_ref(key))
        if record is None or record.before is None:
            return
        self._host.warm.give_back(record.jail_id)
        before = replace(record.before, launch=record.launch, before=None, command_id=None)
        await self._host.records.put_instance(before, durable=True)
        if record.revision != before.revision:
            await collect_revision(before.ref, record.revision, self._host)

    async def _look_again(self, spec: ReservationSpec) -> None:
        """The VMM without a record that would refuse this launch may have ended meanwhile. Others
        are not looked at: that would cost each launch a look at all processes."""
        unrecorded, ref = self._host.unrecorded, spec.before.ref
        if unrecorded.of_instance(ref) or unrecorded.with_tap(Names(spec.net, spec.offset).tap):
            await look_for_unrecorded(self._host)

    def _decide(self, spec: ReservationSpec) -> InstanceRecord:
        ref, launch = spec.before.ref, spec.newest_launch + 1
        if (stray := self._host.unrecorded.of_instance(ref)) is not None:
            raise Conflict(
                f"cannot launch {ref}: process {stray.process.pid} runs in its jail "
                f"{stray.process.jail_id} and is in no record; see docs/operations.md#unknown",
                detail={"jail": stray.process.jail_id},
            )
        self._check_quota(spec)
        if (other := self._other_with_offset(ref, spec.offset)) is not None:
            raise Conflict(
                f"address offset {spec.offset} is used by instance {other}",
                path="instance.json: $.net.guest_ip",
            )
        tap = Names(spec.net, spec.offset).tap
        if (stray := self._host.unrecorded.with_tap(tap)) is not None:
            raise Conflict(
                f"address offset {spec.offset} is used by a VMM that is in no record: process "
                f"{stray.process.pid} of jail {stray.process.jail_id} has TAP {tap}; "
                "see docs/operations.md#unknown",
                path="instance.json: $.net.guest_ip",
            )
        left_mib = self._check_host(spec)
        self._host.warm.fit(left_mib)
        slot = self._host.warm.claim(jail_id_of(ref, launch), spec.vmm_version)
        return replace(
            spec.before,
            status=spec.status,
            since_ms=spec.now_ms,
            launch=launch,
            # A VMM that was launched ahead comes with its uid.
            uid_slot=self._free_slot(ref) if slot is None else slot,
            offset=spec.offset,
            net=spec.net,
            revision=spec.revision,
            vcpus=spec.vcpus,
            mem_mib=spec.mem_mib,
            agent_port=spec.agent_port,
            vmm=None,
            vmm_version=spec.vmm_version,
            command_id=spec.command_id,
            before=replace(spec.before, before=None),
        )

    def _check_quota(self, spec: ReservationSpec) -> None:
        """The tenant's quotas. Those of pools and instances refuse new instances only: what exists
        when a quota is lowered goes on (ADR 1042)."""
        records, ref, quota = self._host.records, spec.before.ref, spec.quota
        tenant_id = ref.tenant_id
        mine = self._usage_of_others(ref, tenant_id)
        for budget, unit, resource, asked, used, limit in (
            (Budget.VCPUS, "vCPUs", "vcpus", spec.vcpus, mine.vcpus, quota.max_vcpus),
            (Budget.MEM, "MiB", "mem_mib", spec.mem_mib, mine.mem_mib, quota.max_mem_mib),
            (Budget.RUNNING, "instances", "instances", 1, mine.instances, quota.max_running),
        ):
            users = records.ranking(resource, tenant_id).top(USERS_MAX)
            _within_quota(budget, unit, asked, used, limit, users)
        if spec.status is not Status.STARTING or self._exists(ref):
            return
        pools = records.pools(tenant_id)
        coming = [each.pool_id for each in self._coming(tenant_id)]
        used = pools.get(ref.pool_id) + coming.count(ref.pool_id)
        limit = quota.max_instances_per_pool
        users = pools.top(USERS_MAX)
        _within_quota(Budget.INSTANCES, "instances", 1, used, limit, [Share(ref.pool_id, used)])
        if not used:
            others = len(pools) + len({each for each in coming if not pools.get(each)})
            _within_quota(Budget.POOLS, "pools", 1, others, quota.max_pools, users)

    def _check_host(self, spec: ReservationSpec) -> int:
        """The host's CPUs and memory; returns the MiB that are left for VMs after it."""
        host, limits, ref = self._host, self._host.settings.limits, spec.before.ref
        used = self._usage_of_others(ref, None) + host.unrecorded.usage
        vcpus = Asked(
            budget=Budget.HOST_VCPUS,
            unit="vCPUs",
            asked=spec.vcpus,
            used=used.vcpus,
            limit=vcpu_capacity(limits, host.facts.cpus()),
            more=shared_with(host.records.ranking("vcpus"), ref.tenant_id),
        )
        if not vcpus.fits:
            raise vcpus.refusal(
                f"not enough host CPUs: instance {ref} needs {spec.vcpus} vCPUs, "
                f"{max(vcpus.limit - vcpus.used, 0)} of {vcpus.limit} are free "
                "([limits] vcpu_overcommit, cpu_reserve)"
            )
        overhead = limits.vmm_overhead_mib
        memory = Asked(
            budget=Budget.HOST_MEMORY,
            unit="MiB",
            asked=spec.mem_mib + overhead,
            used=used.mem_mib + used.instances * overhead,
            limit=memory_capacity_mib(limits, host.facts.memory_mib()),
            more=shared_with(host.records.ranking("mem_mib"), ref.tenant_id),
        )
        left_mib = memory.limit - memory.used - memory.asked
        if not memory.fits:
            raise memory.refusal(
                f"not enough host memory: instance {ref} needs {spec.mem_mib} MiB "
                f"+ {overhead} MiB overhead, {max(left_mib + memory.asked, 0)} MiB are free for VMs"
            )
        return left_mib

    def _exists(self, ref: InstanceRef) -> bool:
        record = self._host.records.instance(ref)
        return record is not None and record.exists

    def _coming(self, tenant_id: str) -> list[InstanceRef]:
        """The tenant's instances that exist once their reservation is committed."""
        pending = self._host.pending_reservations
        return [each for each in pending if each.tenant_id == tenant_id and not self._exists(each)]

    def _usage_of_others(self, ref: InstanceRef, tenant_id: str | None) -> Usage:
        """What all instances but this one take up, with the reservations not committed yet: those
        of the tenant, or of the host. Looks at none but those being reserved."""
        records, pending = self._host.records, self._host.pending_reservations
        usage = records.usage(tenant_id)
        for each in {ref, *pending}:
            if tenant_id in {None, each.tenant_id}:
                now, reserved = records.instance(each), pending.get(each)
                usage -= Usage() if now is None else now.usage
                usage += Usage() if reserved is None or each == ref else reserved.usage
        return usage

    def _other_with_offset(self, ref: InstanceRef, offset: int) -> InstanceRef | None:
        """Another instance of the tenant, live, sleeping or being reserved, with this offset."""
        pending = self._host.pending_reservations
        for each in pending.values():
            if (each.ref.tenant_id, each.offset) == (ref.tenant_id, offset) and each.ref != ref:
                return each.ref
        other = self._host.records.with_offset(ref.tenant_id, offset)
        if other is None or other.ref == ref or other.ref in pending:
            return None
        return other.ref

    def _free_slot(self, ref: InstanceRef) -> int:
        """A slot that no other record has and whose uid no process has.

        A VMM that no record explains, e.g. after the journal was lost, keeps its uid to itself:
        a second one of that uid could open its files and signal it.
        """
        host, base = self._host, self._host.settings.vmm.uid_base
        reserved = {each.uid_slot for each in host.pending_reservations.values()}

        def taken(uid: int) -> bool:
            slot = uid - base
            holder = host.records.with_slot(slot)
            others = holder is not None and holder != ref
            return others or slot in reserved or slot in host.warm.slots

        uid = host.vmms.free_uid(taken)
        if uid is not None:
            return uid - base
        count = self._host.settings.vmm.uid_count
        full = Asked(budget=Budget.HOST_UIDS, unit="uids", asked=1, used=count, limit=count)
        raise full.refusal(f"all {count} uids of [vmm] uid_base, uid_count are in use")


def _within_quota(
    budget: Budget, unit: str, asked: int, used: int, limit: int, users: Sequence[Share]
) -> None:
    found = Asked(budget=budget, unit=unit, asked=asked, used=used, limit=limit, users=users)
    if not found.fits:
        what = NAMES[budget]
        raise found.refusal(f"tenant quota exceeded: {used + asked} {what} needed, {limit} allowed")
