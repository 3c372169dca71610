"""The one place that names the real mechanisms: from settings to the `Host` that handlers get."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from handlers.concurrency import Slots
from handlers.errors import HostFault
from handlers.host.facts import HostFacts, file_system
from handlers.host.jail.jails import Jails
from handlers.host.net.host_network import NetworkMechanisms, open_network_mechanisms
from handlers.host.snapshot.snapshots import Snapshots
from handlers.host.storage.agentd_files import SharedFiles
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
from handlers.host.vmm.cgroups import Cgroups, check_controllers
from handlers.host.vmm.guest_agent import GuestAgents
from handlers.host.vmm.vmms import Vmms
from handlers.instance.artifact_refs import refers
from handlers.interfaces import Host, Later, Records
from handlers.tenant_locks import TenantLocks
from schemas.records import InstanceRecord
from schemas.requests import InstanceRef
from schemas.settings import Settings

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class RealHost:
    """The host and what has to be closed with it."""

    host: Host
    facts: HostFacts
    network: NetworkMechanisms
    snapshots: Snapshots
    jails: Jails

    def close(self) -> None:
        """End the mechanisms' threads; all that was made stays."""
        self.snapshots.close()
        self.network.close()


def open_real_host(settings: Settings, records: Records, later: Later) -> RealHost:
    """Wire the mechanisms of this host.

    Raises:
        HostFault: the settings name something that cannot work here; says what.
    """
    facts = HostFacts()
    network = open_network_mechanisms(settings.network)
    pending_reservations: dict[InstanceRef, InstanceRecord] = {}

    def in_use(key: str) -> bool:
        known: Iterable[InstanceRecord] = (*records.instances(), *pending_reservations.values())
        return any(refers(record, key) for record in known)

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
        artifacts=Artifacts(data=paths.data, state=paths.state, in_use=in_use),
        data_disks=DataDisks(data=paths.data, jail_base=settings.jail_base),
        cgroups=Cgroups(settings),
        jails=jails,
        vmms=Vmms(settings),
        agents=GuestAgents(settings),
        snapshots=snapshots,
        slots=Slots.of(settings.limits),
        later=later,
        pending_reservations=pending_reservations,
    )
    return RealHost(host, facts, network, snapshots, jails)


def prepare_dirs(settings: Settings) -> None:
    """Make hostd's own directories, root-only, and check that they can do what is asked of them.

    Raises:
        HostFault: a directory is on the wrong file system, or mounted `nodev` or `noexec`, or in
            memory with limits in force; a program is missing; limits are not enforced on a
            production host.
    """
    if settings.host.production and not settings.limits.enforce:
        raise HostFault(
            "[limits] enforce = false is for developers: set [host] production = false with it"
        )
    check_controllers(settings)
    for directory in (settings.paths.state, settings.jail_base, settings.paths.run):
        os.makedirs(directory, mode=0o700, exist_ok=True)
    os.chmod(settings.paths.state, 0o700)  # one that was there already may be open to others
    os.makedirs(settings.paths.data, mode=0o755, exist_ok=True)
    state = os.stat(settings.paths.state).st_dev
    for key, directory in (
        ("[vmm] jail_base", settings.jail_base),
        ("[paths] data", settings.paths.data),
    ):
        if os.stat(directory).st_dev != state:
            raise HostFault(
                f"{key} {directory} is on another file system than [paths] state "
                f"{settings.paths.state}: files are hard-linked between them"
            )
    check_on_disk(settings)
    flags = os.statvfs(settings.jail_base).f_flag
    for flag, name in ((os.ST_NODEV, "nodev"), (os.ST_NOEXEC, "noexec")):
        if flags & flag:
            raise HostFault(f"[vmm] jail_base {settings.jail_base} is mounted {name}")
    for key, program in (
        ("firecracker", settings.vmm.firecracker),
        ("jailer", settings.vmm.jailer),
    ):
        if not os.access(program, os.X_OK):
            raise HostFault(f"[vmm] {key}: {program} is missing or not executable")


def check_on_disk(settings: Settings) -> None:
    """What a VMM writes to a tmpfs counts as its memory: a snapshot there ends in an OOM kill.

    Raises:
        HostFault: with limits in force `[paths] state` is in memory.
    """
    state = settings.paths.state
    if settings.limits.enforce and file_system(state) in MEMORY_FILE_SYSTEMS:
        raise HostFault(
            f"[paths] state {state} is in memory: a snapshot there would count against the VMM's "
            "own memory limit, and would not outlast a reboot; put it on a disk"
        )
