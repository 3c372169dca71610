"""Compare journal, files and kernel for instances that run, and restore what is hostd's.

Of the limits of its cgroup, the jail's files and sockets, the VMM's place in the tree, and
`instance.json`; its TAP, pin and addresses are compared with its network (`network_survey.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from handlers.errors import Failure, NotFound
from handlers.instance.launch_plan import cgroup_spec
from handlers.interfaces import Host
from handlers.specs import Restored
from schemas.files import InstanceFile
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef


@dataclass(frozen=True, slots=True)
class FileDrift:
    """`changes` are the fields of hostd's that differ, with the journal's values. `fault`: why the
    file cannot be compared, which is agentd's to repair."""

    changes: Mapping[str, object]
    fault: str | None = None


def is_running(record: InstanceRecord) -> bool:
    """Whether a VMM runs and no command is changing it."""
    return record.status.expects_vmm and record.vmm is not None


async def survey_running(records: Sequence[InstanceRecord], host: Host) -> list[InstanceRecord]:
    """Those that are not as they should be. Changes nothing and asks in bulk; what a command is
    just changing may be named, and is compared again in its lane."""
    expected = [record for record in records if is_running(record)]
    vmms = {record.jail_id: record.vmm for record in expected if record.vmm is not None}
    limits = await host.cgroups.differing([cgroup_spec(record, host) for record in expected])
    lacking = await host.vmms.lacking(vmms)
    files = await host.shared.instances([record.ref for record in expected])
    found: list[InstanceRecord] = []
    for record in expected:
        file = compare_file(record, files[record.ref])
        if (
            record.cgroup_key in limits
            or record.jail_id in lacking
            or file.changes
            or file.fault is not None
        ):
            found.append(record)
    return found


async def restore_running(ref: InstanceRef, launch: int, host: Host) -> Restored:
    """Restore one instance, in its lane; nothing if that launch is not the one that runs.

    Raises:
        HostFault: a limit reads back differently, or a file cannot be written.
    """
    record = host.records.instance(ref)
    if record is None or record.launch != launch or not is_running(record) or record.vmm is None:
        return Restored()
    limits = await host.cgroups.restore(cgroup_spec(record, host))
    leaf = f"{host.cgroups.name} {record.cgroup_key}"
    repaired = [f"{leaf} {name}" for name in limits.repaired]
    lost = [f"{leaf} {name}" for name in limits.lost]
    lacking = await host.vmms.lacking({record.jail_id: record.vmm})
    jail = f"{host.jails.name} {record.jail_id}"
    lost += [f"{jail} {name}" for name in lacking.get(record.jail_id, ())]
    file = compare_file(record, (await host.shared.instances([ref]))[ref])
    if file.changes:
        await host.shared.update_instance(ref, dict(file.changes))
        repaired += [f"instance.json {ref} {name}" for name in file.changes]
    if file.fault is not None:
        lost.append(f"instance.json {ref} {file.fault}")
    return Restored(tuple(repaired), tuple(lost))


def compare_file(record: InstanceRecord, file: InstanceFile | Failure | OSError) -> FileDrift:
    """`instance.json` against the journal. That agentd removed it is no drift."""
    if isinstance(file, NotFound):
        return FileDrift({})
    if isinstance(file, Failure | OSError):
        return FileDrift({}, str(file))
    expected: dict[str, object] = {
        "status": str(Status.RUNNING),
        "firecracker_pid": record.vmm.pid if record.vmm is not None else None,
        "revision_hash": record.revision,
    }
    return FileDrift(
        {name: value for name, value in expected.items() if getattr(file, name) != value}
    )
