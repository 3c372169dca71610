"""Admission control of disk space: decided before anything is made that takes it.

Two bounds. A tenant's data disks (at their nominal size, kept volumes included), artifacts,
snapshots and logs stay within `tenant.json` `max_disk_gib`. On the file system,
`[limits] disk_reserve_mib` stays free. A data disk is allocated in full when it is made, so a
guest's writes need no space that was not admitted. Above the file system's high watermark nothing
is admitted that can wait, whatever would fit (ADR 1043).

A claim counts what was admitted and is not on the file system yet. It is made in the same turn of
the event loop as the decision, and counts until the thing exists, or is not made after all.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from handlers.admission.budgets import USERS_MAX, Asked, Budget, shared_with
from handlers.admission.ranking import Share
from handlers.errors import Failure
from handlers.interfaces import DiskClaim, Host
from handlers.specs import MIB, DiskUsage
from schemas.files import TenantQuota
from schemas.requests import InstanceRef

GIB = 1 << 30
JAIL_BYTES = 16 * MIB  # small drives, logs and the jailer's copy of the VMM
SNAPSHOT_STATE_BYTES = 16 * MIB  # beside the memory: device state and kept drives


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    """What is about to be made. `what` is for messages, e.g. `a snapshot of a/b/c`.

    `size_bytes` counts against the tenant's quota and the host, `host_bytes` against the host only:
    what the tenant has admitted already, and the jail, which goes with the VMM.

    `replaces`: an instance whose snapshots go once this is made. `exists`: whether it is made by
    now, and so no longer to be counted apart. `can_wait`: refused above the high watermark.
    """

    tenant_id: str
    what: str
    size_bytes: int = 0
    host_bytes: int = 0
    replaces: InstanceRef | None = None
    can_wait: bool = False
    exists: Callable[[], bool] = lambda: False


def refuse_low_disk(host: Host) -> None:
    """Raise Exhausted while the ballast is released: only what gives space back may run."""
    if host.disk.low:
        reserve_mib = host.settings.limits.disk_reserve_mib
        free_mib = host.disk.free_bytes() // MIB
        full = Asked(budget=Budget.HOST_DISK, unit="MiB", asked=reserve_mib, used=0, limit=free_mib)
        raise full.refusal(
            f"file system of {host.disk.path} is full: until {reserve_mib} MiB are free, this host "
            "only stops and destroys; see docs/operations.md#full-disk"
        )


def refuse_high_disk(what: str, host: Host) -> None:
    """Raise Exhausted above the high watermark: what takes space and can wait is not begun."""
    if host.disk.high:
        limits, used = host.settings.limits, host.disk.used_percent()
        mark = Asked(
            budget=Budget.HOST_DISK_MARK,
            unit="percent",
            asked=0,
            used=round(used),
            limit=round(limits.disk_low_percent),
        )
        raise mark.refusal(
            f"file system of {host.disk.path} is above its high watermark: {used:.1f} % are used, "
            f"{what} is admitted again below {limits.disk_low_percent:g} % "
            "([limits] disk_low_percent); sleeping instances can be woken, stopped and destroyed"
        )


async def quota_of(tenant_id: str, host: Host) -> TenantQuota | None:
    """The tenant's quota; None if `tenant.json` cannot be read: the command needs nothing else of
    it, and the host's own bound holds all the same."""
    try:
        return (await host.shared.tenant(tenant_id)).quotas
    except Failure:
        return None


@asynccontextmanager
async def admitted(need: DiskNeed, quota: TenantQuota | None, host: Host) -> AsyncGenerator[None]:
    """Claim the space while the thing is made.

    Raises:
        Exhausted: the tenant's quota or the host's disk is used up; names which, and by what.
    """
    refuse_low_disk(host)
    if need.can_wait:
        refuse_high_disk(need.what, host)
    # What comes to exist while the files are measured may count twice, but never not at all.
    earlier = {claim for claim in host.disk_claims if not claim.exists()}
    bounded = quota if need.size_bytes else None
    if bounded is not None:  # else it is not asked what the tenant uses: that walks its files
        usage = await host.disk.usage(need.tenant_id, without=need.replaces)
        disks_bytes = await data_disks_bytes(need.tenant_id, host)
    else:
        usage = DiskUsage(artifacts_bytes=0, snapshots_bytes=0, logs_bytes=0)
        disks_bytes = 0
    # From here to the claim without an await.
    claims = earlier | {claim for claim in host.disk_claims if not claim.exists()}
    if bounded is not None:
        mine = sum(c.size_bytes for c in claims if c.tenant_id == need.tenant_id)
        used = disks_bytes + usage.total_bytes + mine
        quota_bytes = bounded.max_disk_gib * GIB
        if used + need.size_bytes > quota_bytes:
            parts = {
                "data_disks": _mib(disks_bytes),
                "artifacts": _mib(usage.artifacts_bytes),
                "snapshots": _mib(usage.snapshots_bytes),
                "logs": _mib(usage.logs_bytes),
                "being_made": _mib(mine),
            }
            named = ", ".join(f"{name.replace('_', ' ')} {mib}" for name, mib in parts.items())
            disks = host.records.ranking("disk_bytes", need.tenant_id).top(USERS_MAX)
            raise Asked(
                budget=Budget.DISK,
                unit="MiB",
                asked=_mib(need.size_bytes),
                used=_mib(used),
                limit=quota_bytes // MIB,
                users=[Share(name, _mib(size_bytes)) for name, size_bytes in disks],
                more={"parts": parts},
            ).refusal(
                f"tenant quota exceeded: {need.what} needs {_mib(need.size_bytes)} MiB of disk, "
                f"{_mib(used)} of {quota_bytes // MIB} MiB are used: {named} MiB"
            )
    reserve = host.settings.limits.disk_reserve_mib * MIB
    claimed = sum(c.size_bytes + c.host_bytes for c in claims)
    free = host.disk.free_bytes() - reserve - claimed
    total = need.size_bytes + need.host_bytes
    if total > free:
        shared = shared_with(host.records.ranking("disk_bytes"), need.tenant_id)
        raise Asked(
            budget=Budget.HOST_DISK,
            unit="MiB",
            asked=_mib(total),
            used=_mib(claimed),
            limit=max(free + claimed, 0) // MIB,
            more={**shared, "own": _mib(shared["own"])},
        ).refusal(
            f"not enough disk space on this host: {need.what} needs {_mib(total)} MiB, "
            f"{_mib(max(free, 0))} MiB are free on the file system of {host.disk.path} beside "
            "[limits] disk_reserve_mib"
        )
    claim = DiskClaim(need.tenant_id, need.size_bytes, need.host_bytes, need.exists)
    host.disk_claims.add(claim)
    try:
        yield
    finally:
        host.disk_claims.discard(claim)


async def data_disks_bytes(tenant_id: str, host: Host) -> int:
    """The nominal size of the tenant's data disks, those that a Destroy kept included."""
    total = host.records.usage(tenant_id).disk_bytes
    for kept in host.records.kept_volumes(tenant_id):
        if kept.disk is not None:
            with contextlib.suppress(Failure):
                if not await host.data_disks.exists(str(kept.ref)):
                    continue  # agentd removed it
            total += kept.disk.size_bytes
    return total


def _mib(size_bytes: int) -> int:
    return -(-size_bytes // MIB)
