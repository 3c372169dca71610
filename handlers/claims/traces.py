"""What processes of an instance are on this host, by its jails, cgroups and uids."""

from dataclasses import dataclass

from handlers.claims.facts import Fact
from handlers.claims.unrecorded import VmmProcess
from handlers.errors import HostFault
from handlers.interfaces import Host
from schemas import naming
from schemas.records import InstanceRecord
from schemas.requests import InstanceRef

ROOT_UID = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """What a look at one instance found.

    Attributes:
        jails: IDs of its jails in which a process runs, by root directory or cgroup.
        processes: those with a uid of `[vmm]` that run in them.
        facts: whether anything runs for it that is in none of its jails.
        owners: uids that its data disk may belong to.
    """

    jails: tuple[str, ...]
    processes: tuple[VmmProcess, ...]
    facts: tuple[Fact, ...]
    owners: frozenset[int]


async def read_trace(ref: InstanceRef, record: InstanceRecord | None, host: Host) -> Trace:
    """Look for every process that may be the instance's VMM. Changes nothing."""
    launches = {*await host.jails.launches(ref), *await host.vmms.launches(ref)}
    if record is not None and record.launch:
        launches.add(record.launch)
    jails = [naming.jail_id(ref, launch) for launch in sorted(launches)]
    processes = await host.vmms.processes()
    inside = tuple(each for each in processes if each.jail_id in jails)
    alive = {each.jail_id for each in inside}
    alive |= {jail_id for jail_id in jails if await host.vmms.exists(jail_id)}
    owners = {ROOT_UID}
    for jail_id in jails:
        metadata = await host.jails.metadata(jail_id)
        if metadata is not None and metadata.ref == ref:
            owners.add(metadata.uid)
    outside = [each for each in processes if each.uid in owners and each.jail_id not in jails]
    facts = [Fact("other processes", not outside, _described(outside))]
    if record is not None and record.vmm is not None and not alive:
        facts.append(await _ended(record, host))
    return Trace(
        tuple(each for each in jails if each in alive), inside, tuple(facts), frozenset(owners)
    )


def _described(processes: list[VmmProcess]) -> str:
    if not processes:
        return "no other process has a uid of the instance's jails"
    names = ", ".join(f"{each.pid} (uid {each.uid}, root {each.jail_id})" for each in processes[:8])
    return f"a uid of the instance's jails is used elsewhere: by process {names}"


async def _ended(record: InstanceRecord, host: Host) -> Fact:
    pid = record.vmm.pid if record.vmm is not None else 0
    try:
        alive = record.vmm is not None and await host.vmms.alive(record.vmm)
    except HostFault as failure:
        return Fact("VMM has ended", False, failure.message)
    if alive:
        return Fact("VMM has ended", False, f"process {pid} runs, but not in its jail")
    return Fact("VMM has ended", True, f"process {pid} of the journal is gone")
