"""An instance that the bare script launches: its files, and its jobs.

The imported revision and the data disk outlast a launch: hostd's own mechanisms make them. Cgroup
leaf, jail and TAP of a launch `bare.make` makes, each with what hostd would give it, as part of a
job or before it; hostd's mechanisms remove them.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from bench.raw import bare
from handlers.host.jail.jails import Jails
from handlers.host.linux.kernel_thread import no_namespace
from handlers.host.net.host_network import NetworkMechanisms, open_network_mechanisms
from handlers.host.net.rtnetlink_messages import (
    link_change,
    new_fdb_entry,
    new_neighbour,
    port_change,
)
from handlers.host.net.taps import port_settings
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
from handlers.host.storage.drive_images import CONFIG, SmallDrives
from handlers.host.vmm.api_schema import boot_requests, for_version
from handlers.host.vmm.cgroup_limits import limits_of
from handlers.host.vmm.cgroups import Cgroups
from handlers.host.vmm.jailer import Jailer
from handlers.host.vmm.versions import parse_version
from handlers.instance.launch_plan import PIDS_PER_VMM
from handlers.interfaces import CPU_PERIOD_US
from handlers.jail_names import (
    CONFIG_DRIVE,
    DATA_DISK,
    KERNEL,
    LOG,
    MEMORY,
    ROOTFS,
    STATE,
    VSOCK_SOCKET,
    WOKEN_DIR,
    in_jail,
)
from handlers.specs import (
    MIB,
    ArtifactSpec,
    BootConfig,
    CgroupSpec,
    DataDiskSpec,
    DriveConfig,
    JailFile,
    LaunchSpec,
    NicConfig,
    TapSpec,
)
from schemas import naming
from schemas.records import DiskIdentity
from schemas.requests import InstanceRef, TenantNet
from tests.guests.firecracker import VERSION
from tests.live_host import LiveHost

FIRST_SLOT = 60_000
START_CALL = ("PUT", "/actions", {"action_type": "InstanceStart"})
PAUSE_CALL = ("PATCH", "/vm", {"state": "Paused"})
RESUME_CALL = ("PATCH", "/vm", {"state": "Resumed"})
CTRL_ALT_DEL_CALL = ("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
DRAIN_TIMEOUT_S = 30


@dataclass
class BareInstance:
    """One instance that the bare script launches repeatedly; no other uses its `offset`."""

    host: LiveHost
    net: TenantNet
    ref: InstanceRef
    offset: int
    revision: str
    mem_mib: int
    data_disk_mib: int
    network: NetworkMechanisms
    launch: int = 0

    def __post_init__(self) -> None:
        settings = self.host.settings
        self._paths = settings.paths
        self._jails = Jails(
            data=settings.paths.data, state=settings.paths.state, jail_base=settings.jail_base
        )
        self._cgroups = Cgroups(settings)
        self._jailer = Jailer(settings)
        self.uid = settings.vmm.uid_base + FIRST_SLOT + self.offset
        self._disk: DiskIdentity | None = None
        self.snapshot = Path(self.host.directory, f"bare-{self.ref.instance_id}")

    @property
    def jail_id(self) -> str:
        return naming.jail_id(self.ref, self.launch)

    @property
    def cgroup_key(self) -> str:
        return naming.cgroup_key(self.ref.tenant_id, self.jail_id)

    @property
    def tap(self) -> str:
        return naming.tap_name(self.net.tenant_net_id, self.offset)

    @property
    def root(self) -> Path:
        return Path(self.host.settings.jail_base, "firecracker", self.jail_id, "root")

    @property
    def spec(self) -> LaunchSpec:
        cgroup = naming.cgroup_name(self.host.settings.limits.cgroup, self.cgroup_key)
        return LaunchSpec(self.jail_id, self.uid, cgroup)

    @property
    def tap_spec(self) -> TapSpec:
        return TapSpec(
            self.tap,
            self.net.bridge_name,
            self.uid,
            naming.mac_address(self.net.tenant_net_id, self.offset),
            naming.guest_ip(self.net, self.offset),
            naming.interface_alias(str(self.ref)),
        )

    async def make(self, *, wakes: bool) -> None:
        """Make what the next launch needs here and now, not as part of its job."""
        bare.make(await self.making(wakes=wakes))

    async def making(self, *, wakes: bool) -> dict[str, Any]:
        """What `bare.make` makes for the next launch; for a wake also the snapshot's links."""
        self.launch += 1
        files = await self._files()
        image = Path(self.host.directory, f"bare-{self.ref.instance_id}.ext4")
        if not image.exists():
            with open(image, "wb") as file:
                SmallDrives().write(file.fileno(), CONFIG, b"{}\n")
        leaf = self._cgroups.tree.path(self.spec.cgroup)
        enforced = self.host.settings.limits.enforce
        snapshot = [str(self.snapshot / name) for name in (STATE, MEMORY)]
        return {
            "cgroup": leaf,
            "limits": limits_of(leaf, self._cgroup_spec()) if enforced else {},
            "root": str(self.root),
            "uid": self.uid,
            "links": {file.name: file.source for file in files},
            "writable": [file.source for file in files if file.writable],
            "empty": [LOG],
            "images": {CONFIG_DRIVE: str(image)},
            "snapshot": {WOKEN_DIR: snapshot} if wakes else {},
            "tap": self.tap,
            "messages": await self._messages(),
        }

    async def _messages(self) -> list[tuple[str, bool]]:
        """Those of hostd's for a new TAP; whether each is about it, whose index is put in then."""
        tap = self.tap_spec
        bridge = await self.network.netlink.run(lambda kernel: kernel.existing_link(tap.bridge))
        port = port_settings(isolate=self.host.settings.network.isolate_guests)
        requests = [
            (link_change(0, ifalias=tap.alias, master=bridge.index), True),
            (port_change(0, **port), True),
            (new_fdb_entry(0, tap.mac), True),
            (new_neighbour(bridge.index, tap.guest_ip, tap.mac), False),
            (link_change(0, state="up"), True),
        ]
        return [(request.with_header(1).hex(), own) for request, own in requests]

    async def _files(self) -> list[JailFile]:
        artifacts = Artifacts(data=self._paths.data, state=self._paths.state)
        artifact = await artifacts.ensure(
            ArtifactSpec(self.ref.tenant_id, self.ref.pool_id, self.revision)
        )
        files = [JailFile(KERNEL, artifact.vmlinux), JailFile(ROOTFS, artifact.rootfs)]
        if self.data_disk_mib:
            disks = DataDisks(data=self._paths.data, jail_base=self.host.settings.jail_base)
            disk = await disks.ensure(DataDiskSpec(self.ref, self.data_disk_mib, self._disk))
            self._disk = disk.identity
            files.append(JailFile(DATA_DISK, disk.path, disk.identity))
        return files

    def _cgroup_spec(self) -> CgroupSpec:
        overhead = self.host.settings.limits.vmm_overhead_mib
        return CgroupSpec(
            self.ref.tenant_id,
            self.jail_id,
            memory_max_bytes=(self.mem_mib + overhead) * MIB,
            cpu_quota_us=CPU_PERIOD_US,
            pids_max=PIDS_PER_VMM,
        )

    def start_job(self) -> dict[str, Any]:
        """What hostd's StartInstance asks of jailer, API and agent."""
        version = parse_version(VERSION)
        calls = [
            (method, path, msgspec.to_builtins(accepted))
            for method, path, body in boot_requests(self._config())
            if (accepted := for_version(body, version)) is not None
        ]
        return self._job([*calls, START_CALL], ["Ping"])

    def wake_job(self) -> dict[str, Any]:
        """The calls of hostd's WakeInstance; it must have been made for a wake."""
        body = {
            "snapshot_path": in_jail(WOKEN_DIR, STATE),
            "mem_backend": {"backend_type": "File", "backend_path": in_jail(WOKEN_DIR, MEMORY)},
            "resume_vm": False,
        }
        clock = {"SetClock": {"unix_nanos": 1_900_000_000_000_000_000}}
        return self._job([("PUT", "/snapshot/load", body), RESUME_CALL], ["Wake", clock])

    def sleep_job(self) -> dict[str, Any]:
        """To be run once on a started VM: state and memory are in `snapshot`, the VM is gone."""
        body = {
            "snapshot_type": "Full",
            "snapshot_path": in_jail(STATE),
            "mem_file_path": in_jail(MEMORY),
        }
        shutil.rmtree(self.snapshot, ignore_errors=True)
        self.snapshot.mkdir()
        return {
            "root": str(self.root),
            "drain": [{"SleepPrep": {"drain_timeout_secs": DRAIN_TIMEOUT_S}}],
            "calls": [PAUSE_CALL, ("PUT", "/snapshot/create", body)],
            "keep": str(self.snapshot),
            "end": self._end(kill=True),
        }

    def stop_job(self) -> dict[str, Any]:
        """To be run on a woken VM: it is asked to shut down; its snapshot goes with it."""
        end = self._end(kill=False) | {"snapshot": str(self.snapshot)}
        return {"root": str(self.root), "calls": [CTRL_ALT_DEL_CALL], "end": end}

    def _end(self, *, kill: bool) -> dict[str, Any]:
        return {
            "kill": kill,
            "tap": self.tap,
            "cgroup": self._cgroups.tree.path(self.spec.cgroup),
            "jail": str(self.root.parent),
        }

    def _job(self, calls: list[Any], agent: list[object]) -> dict[str, Any]:
        jailer = self._jailer.arguments(self.spec)
        return {"root": str(self.root), "jailer": jailer, "calls": calls, "agent": agent}

    async def clear(self) -> None:
        """Kill the VMM and remove jail, cgroup and TAP; what is gone already is success.

        Also after a job that ended the VMM: the bridge's neighbour entry of the guest is left then.
        """
        pids = self._cgroups.tree.pids(self.spec.cgroup)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self._cgroups.tree.pids(self.spec.cgroup):
            await asyncio.sleep(0.002)
        await self.network.taps.remove(self.tap)
        await self._jails.remove(self.jail_id)
        await self._cgroups.remove(self.cgroup_key)

    def _config(self) -> BootConfig:
        drives = [
            DriveConfig("rootfs", in_jail(ROOTFS), read_only=True, root_device=True),
            DriveConfig("config", in_jail(CONFIG_DRIVE), read_only=True),
        ]
        if self.data_disk_mib:
            drives.append(DriveConfig("data", in_jail(DATA_DISK), read_only=False))
        guest_ip = naming.guest_ip(self.net, self.offset)
        address = f"ip={guest_ip}::{self.net.gateway_ip}:{naming.netmask(self.net)}::eth0:off"
        return BootConfig(
            vcpus=1,
            mem_mib=self.mem_mib,
            kernel=in_jail(KERNEL),
            initrd=None,
            boot_args=f"reboot=k panic=1 {address}",
            drives=tuple(drives),
            nic=NicConfig(self.tap, naming.mac_address(self.net.tenant_net_id, self.offset)),
            vsock=in_jail(VSOCK_SOCKET),
        )


class BareInstances:
    """The instances of a measurement, made with one set of network mechanisms.

    `enter` leads to the host's network namespace, where the process is not in it all the time.
    """

    def __init__(
        self,
        host: LiveHost,
        net: TenantNet,
        revision: str,
        *,
        mem_mib: int,
        data_disk_mib: int,
        enter: Callable[[], None] = no_namespace,
    ) -> None:
        self._host = host
        self._net = net
        self._revision = revision
        self._size = {"mem_mib": mem_mib, "data_disk_mib": data_disk_mib}
        self._network = open_network_mechanisms(host.settings.network, enter)
        self.all: list[BareInstance] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._network.close()
        for instance in self.all:
            shutil.rmtree(instance.snapshot, ignore_errors=True)

    def add(self, name: str, offset: int) -> BareInstance:
        ref = InstanceRef("acme", "web", name)
        instance = BareInstance(
            self._host, self._net, ref, offset, self._revision, network=self._network, **self._size
        )
        self.all.append(instance)
        return instance
