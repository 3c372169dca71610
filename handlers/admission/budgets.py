"""The budgets that a command can exhaust, and the answer that says which, how large, and by whom.

A sender learns the names of its own tenant's users only: of the host's budgets it learns how many
tenants share them, and what its own one has (ADR 1041). `Capacity` is all of the host's, for its
state and its operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from handlers.admission.ranking import Ranking, Share
from handlers.errors import Exhausted
from handlers.interfaces import Host
from schemas.settings import LimitSettings

USERS_MAX: Final = 5  # named in `detail.used_by`
IN_MESSAGE: Final = 3


class Budget(StrEnum):
    """`detail.budget`. Those of a tenant are fields of `tenant.json` `quotas`."""

    VCPUS = "tenant.max_vcpus"
    MEM = "tenant.max_mem_mib"
    RUNNING = "tenant.max_running"
    POOLS = "tenant.max_pools"
    INSTANCES = "tenant.max_instances_per_pool"
    DISK = "tenant.max_disk_gib"
    HOST_VCPUS = "host.vcpus"
    HOST_MEMORY = "host.memory"
    HOST_DISK = "host.disk"
    HOST_DISK_MARK = "host.disk_watermark"
    HOST_UIDS = "host.uids"

    @property
    def path(self) -> str | None:
        """The file and field that set it; None for one of the host's settings."""
        scope, _, name = self.value.partition(".")
        return f"tenant.json: $.quotas.{name}" if scope == "tenant" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How full a budget is. `unit` is of the three numbers: MiB, vCPUs, instances, pools, uids, %.

    `more`: further facts for the reply's `detail`.
    """

    budget: Budget
    unit: str
    asked: int
    used: int
    limit: int
    users: Sequence[Share] = ()
    more: dict[str, Any] | None = None

    @property
    def fits(self) -> bool:
        return self.used + self.asked <= self.limit

    def refusal(self, message: str) -> Exhausted:
        """The failure of a command that asked for too much."""
        detail: dict[str, Any] = {
            "budget": self.budget.value,
            "unit": self.unit,
            "asked": self.asked,
            "used": self.used,
            "limit": self.limit,
            **(self.more or {}),
        }
        if self.users:
            detail["used_by"] = [
                {"name": each.name, "amount": each.amount} for each in self.users[:USERS_MAX]
            ]
            named = ", ".join(f"{each.name} {each.amount}" for each in self.users[:IN_MESSAGE])
            message = f"{message}; most is used by {named}"
        return Exhausted(message, path=self.budget.path, detail=detail)


def shared_with(tenants: Ranking, tenant_id: str) -> dict[str, Any]:
    """What a tenant's sender may know of who uses a budget of the host; in the ranking's unit."""
    return {"tenants": len(tenants), "own": tenants.get(tenant_id)}


def vcpu_capacity(limits: LimitSettings, cpus: int) -> int:
    """How many vCPUs the host admits: those of the CPUs that are not its own."""
    return int(max(0.0, cpus - limits.cpu_reserve) * limits.vcpu_overcommit)


def memory_capacity_mib(limits: LimitSettings, memory_mib: int) -> int:
    """The memory for VMs and their VMMs: what is not the host's own."""
    return max(0, memory_mib - limits.mem_reserve_mib)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Each budget of the host with its limit. `warm_uids` are those of idle VMMs."""

    instances: int
    vcpus: int
    vcpus_used: int
    mem_mib: int
    mem_used_mib: int
    disk_free_bytes: int
    disk_claimed_bytes: int
    uids: int
    uids_used: int
    uids_warm: int
    addresses: int
    addresses_used: int

    def facts(self) -> dict[str, Any]:
        """The part that agentd schedules by, without what is the operator's alone."""
        return {
            "instances": self.instances,
            "vcpus": self.vcpus,
            "vcpus_used": self.vcpus_used,
            "mem_mib": self.mem_mib,
            "mem_free_mib": max(0, self.mem_mib - self.mem_used_mib),
            "disk_free_mib": max(0, self.disk_free_bytes - self.disk_claimed_bytes) >> 20,
        }


def capacity(host: Host) -> Capacity:
    """As of the last commit; costs the same however many instances there are. `disk_free_bytes` is
    what is free beside the reserve."""
    settings, records = host.settings, host.records
    live = records.usage() + host.unrecorded.usage
    limits = settings.limits
    reserve_bytes = limits.disk_reserve_mib << 20
    claims = [each for each in host.disk_claims if not each.exists()]
    return Capacity(
        instances=live.instances,
        vcpus=vcpu_capacity(limits, host.facts.cpus()),
        vcpus_used=live.vcpus,
        mem_mib=memory_capacity_mib(limits, host.facts.memory_mib()),
        mem_used_mib=live.mem_mib + live.instances * limits.vmm_overhead_mib,
        disk_free_bytes=max(0, host.disk.free_bytes() - reserve_bytes),
        disk_claimed_bytes=sum(each.size_bytes + each.host_bytes for each in claims),
        uids=settings.vmm.uid_count,
        uids_used=records.held_uids(),
        uids_warm=len(host.warm.slots),
        addresses=records.address_count(),
        addresses_used=records.held_addresses(),
    )
