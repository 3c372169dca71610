"""Imported artifact revisions: removed when no instance refers to them.

An instance refers to its revision from its reservation on, running, sleeping or stopped, until it
is destroyed or started with another one (docs/adr/0003).
"""

from dataclasses import replace

from handlers.admission.disk_admission import DiskNeed, admitted
from handlers.concurrency import limited
from handlers.errors import Failure
from handlers.interfaces import Host
from handlers.specs import Artifact, ArtifactSpec
from handlers.steps import Steps
from schemas.files import TenantQuota
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef


async def ensure_revision(
    ref: InstanceRef,
    revision: str,
    quota: TenantQuota,
    steps: Steps,
    host: Host,
    *,
    can_wait: bool,
) -> Artifact:
    """Import the revision's files; not undone, since another instance may use them by then.

    An import holds no slot of a launch, and ends at its next chunk if the command has to end. One
    that `can_wait` is refused above the disk's high watermark.

    Raises:
        Exhausted: the tenant's disk quota, or the host's disk space, is used up.
        Superseded, Expired, Halted: the wait for a slot, or the import, was interrupted.
    """
    spec = ArtifactSpec(ref.tenant_id, ref.pool_id, revision)
    if await host.artifacts.imported(spec.key):
        return await steps.ensure_kept(host.artifacts, spec)
    async with limited(host.slots.imports, ref.tenant_id, "wait_import_slot", steps):
        if await host.artifacts.imported(spec.key):  # another instance's, while this one waited
            return await steps.ensure_kept(host.artifacts, spec)
        size_bytes = await host.artifacts.size_of_import(spec)
        need = DiskNeed(
            tenant_id=ref.tenant_id,
            what=f"artifact {spec.key}",
            size_bytes=size_bytes,
            can_wait=can_wait,
        )
        async with admitted(need, quota, host):
            record = host.records.instance(ref)
            if record is not None:  # synced: an import outlasts a power loss, so must its reference
                await host.records.put_instance(record, durable=True)
            bounded = replace(spec, admitted_bytes=size_bytes)
            return await steps.interruptible(
                host.artifacts.name, lambda: host.artifacts.ensure(bounded)
            )


async def collect_revision(ref: InstanceRef, revision: str | None, host: Host) -> None:
    """Remove a revision if nothing refers to it; the mechanism asks `refers` under its lock."""
    if revision is not None:
        await host.artifacts.remove(ArtifactSpec(ref.tenant_id, ref.pool_id, revision).key)


async def release_revision(ref: InstanceRef, revision: str | None, host: Host) -> tuple[str, ...]:
    """As `collect_revision`, but returns the `left_behind` entry instead of raising."""
    try:
        await collect_revision(ref, revision, host)
    except Failure as error:
        return (f"artifact {ref.tenant_id}/{ref.pool_id}/{revision}: {error.message}",)
    return ()


def refers(record: InstanceRecord, key: str) -> bool:
    """Whether the instance refers to the revision named by an `ArtifactSpec.key`.

    An instance being destroyed does not: its Destroy is always completed.
    """
    if record.status is Status.DESTROYING:
        return False
    return key == ArtifactSpec.key_of(record)
