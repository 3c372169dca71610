"""Builds the `Host` that handlers get: the one place that names the real mechanisms."""

from dataclasses import dataclass

from handlers.claims.unrecorded import UnrecordedVmms
from handlers.concurrency import Slots
from handlers.host.facts import HostFacts
from handlers.host.inventory import Inventory, collect
from handlers.host.jail.jails import Jails
from handlers.host.jail.layout import JailLayout
from handlers.host.linux.file_threads import run_in_slow_thread
from handlers.host.net.host_network import NetworkMechanisms, open_network_mechanisms
from handlers.host.orphans import OrphanRemoval
from handlers.host.snapshot.manifest import sleeps_on
from handlers.host.snapshot.snapshots import Snapshots
from handlers.host.storage.agentd_files import SharedFiles
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
from handlers.host.storage.disk_space import DiskSpace
from handlers.host.vmm.binaries import VmmBinaries
from handlers.host.vmm.cgroups import Cgroups
from handlers.host.vmm.exit_watch import ExitWatch
from handlers.host.vmm.guest_agent import GuestAgents
from handlers.host.vmm.vmms import Vmms
from handlers.host.vmm.warm_pool import WarmPool
from handlers.instance.artifact_refs import refers
from handlers.interfaces import Host, Later, Records
from handlers.tenant_locks import TenantLocks
from schemas.records import InstanceRecord
from schemas.requests import InstanceRef
from schemas.settings import Settings


@dataclass(frozen=True, slots=True)
class RealHost:
    """The host, what reconciliation reads of it, and what must be closed with it."""

    host: Host
    artifacts: Artifacts
    disk: DiskSpace
    facts: HostFacts
    network: NetworkMechanisms
    snapshots: Snapshots
    cgroups: Cgroups
    jails: Jails
    jail_dirs: JailLayout
    exits: ExitWatch
    warm: WarmPool
    binaries: VmmBinaries

    @property
    def orphan_removal(self) -> OrphanRemoval:
        host = self.host
        return OrphanRemoval(
            host.settings.paths,
            self.network,
            self.cgroups,
            self.jails,
            host.artifacts,
            host.snapshots,
        )

    async def take_inventory(self) -> Inventory:
        """Everything on this host that carries hostd's mark."""
        return await run_in_slow_thread(lambda _: collect(self.host.settings))

    def close(self) -> None:
        """End the mechanisms' threads; every resource on the host stays."""
        self.snapshots.close()
        self.network.close()


def open_real_host(
    settings: Settings, records: Records, later: Later, disk: DiskSpace, binaries: VmmBinaries
) -> RealHost:
    """Connect the mechanisms of this host.

    Raises:
        HostFault: a setting cannot work on this host; the message names it.
    """
    facts = HostFacts()
    network = open_network_mechanisms(settings.network)
    network.base.policy.refresh()
    pending_reservations: dict[InstanceRef, InstanceRecord] = {}
    unrecorded = UnrecordedVmms()

    def in_use(key: str) -> bool:
        pending = pending_reservations.values()
        return records.refers(key) or any(refers(record, key) for record in pending)

    async def asleep(key: str) -> bool:
        tenant_id, _, _ = key.partition("/")
        known = {record.ref for record in records.instances(tenant_id)}
        return await sleeps_on(settings.paths.state, key, known)

    def slot_in_use(slot: int) -> bool:
        pending = pending_reservations.values()
        return records.with_slot(slot) is not None or any(r.uid_slot == slot for r in pending)

    def free_mib() -> int:
        limits, live = settings.limits, records.usage() + unrecorded.usage
        used = live.mem_mib + live.instances * limits.vmm_overhead_mib
        return facts.memory_mib() - limits.mem_reserve_mib - used

    warm = WarmPool(settings, slot_in_use, free_mib, facts.cpus(), binaries)
    paths = settings.paths
    jails = Jails(
        data=paths.data,
        state=paths.state,
        jail_base=settings.jail_base,
        log_bytes=settings.vmm.log_bytes,
    )
    snapshots = Snapshots(
        data=paths.data,
        state=paths.state,
        jail_base=settings.jail_base,
        cpu_model=facts.cpu_model(),
        kernel_release=facts.kernel_release(),
    )
    artifacts = Artifacts(
        data=paths.data,
        state=paths.state,
        in_use=in_use,
        asleep=asleep,
        max_mib=settings.limits.max_artifact_mib,
    )
    cgroups = Cgroups(settings)
    host = Host(
        settings=settings,
        locks=TenantLocks(),
        records=records,
        facts=facts,
        shared=SharedFiles(paths.data),
        networks=network.networks,
        bridges=network.bridges,
        tenant_rules=network.tenant_rules,
        pins=network.pins,
        taps=network.taps,
        artifacts=artifacts,
        data_disks=DataDisks(data=paths.data, jail_base=settings.jail_base),
        cgroups=cgroups,
        jails=jails,
        vmms=Vmms(settings, binaries=binaries, tenant_of=records.tenant_of_jail),
        warm=warm,
        agents=GuestAgents(settings),
        snapshots=snapshots,
        disk=disk,
        slots=Slots.of(settings.limits),
        later=later,
        pending_reservations=pending_reservations,
        disk_claims=set(),
        unrecorded=unrecorded,
        seen_alive={},
    )
    return RealHost(
        host=host,
        artifacts=artifacts,
        disk=disk,
        facts=facts,
        network=network,
        snapshots=snapshots,
        cgroups=cgroups,
        jails=jails,
        jail_dirs=JailLayout(settings.jail_base),
        exits=ExitWatch(),
        warm=warm,
        binaries=binaries,
    )
