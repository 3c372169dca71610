"""The VM of a bare launch, prepared beforehand and not timed: same files, same namespace.

It is made by hostd's own mechanisms, so the bare script finds exactly what hostd makes for itself:
the jail with its links, log and config drive, the cgroup leaf, the TAP on the tenant's bridge.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from handlers.host.jail.jails import Jails
from handlers.host.net.host_network import NetworkMechanisms, open_network_mechanisms
from handlers.host.storage.artifacts import Artifacts
from handlers.host.storage.data_disks import DataDisks
from handlers.host.vmm.api_schema import boot_requests, parse_version
from handlers.host.vmm.cgroups import Cgroups
from handlers.host.vmm.jailer import Jailer
from handlers.instance.launch import CONFIG as CONFIG_DRIVE
from handlers.instance.launch import DATA, KERNEL, MIB, PIDS_PER_VMM, ROOTFS, VSOCK
from handlers.interfaces import CPU_PERIOD_US
from handlers.specs import (
    ArtifactSpec,
    BootConfig,
    CgroupSpec,
    DataDiskSpec,
    DriveConfig,
    JailFile,
    JailSpec,
    LaunchSpec,
    TapSpec,
)
from schemas import naming
from schemas.records import DiskIdentity
from schemas.requests import InstanceRef, TenantNet
from tests.guests.firecracker import VERSION
from tests.live_host import LiveHost

FIRST_SLOT = 60_000
WOKEN = "woken"
START_CALL = ("PUT", "/actions", {"action_type": "InstanceStart"})
PAUSE_CALL = ("PATCH", "/vm", {"state": "Paused"})
RESUME_CALL = ("PATCH", "/vm", {"state": "Resumed"})


@dataclass
class BareVm:
    """One instance that the bare script launches again and again; `offset` is its alone."""

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
    def tap(self) -> str:
        return naming.tap_name(self.net.tenant_net_id, self.offset)

    @property
    def root(self) -> Path:
        return Path(self.host.settings.jail_base, "firecracker", self.jail_id, "root")

    @property
    def spec(self) -> LaunchSpec:
        cgroup = f"{self.host.settings.limits.cgroup}/{self.ref.tenant_id}/{self.jail_id}"
        return LaunchSpec(self.jail_id, self.uid, cgroup)

    async def prepare(self) -> None:
        """Jail, cgroup and TAP of the next launch."""
        self.launch += 1
        artifacts = Artifacts(data=self._paths.data, state=self._paths.state)
        artifact = await artifacts.ensure(
            ArtifactSpec(self.ref.tenant_id, self.ref.pool_id, self.revision)
        )
        files = [JailFile("vmlinux", artifact.vmlinux), JailFile("rootfs.ext4", artifact.rootfs)]
        if self.data_disk_mib:
            disks = DataDisks(data=self._paths.data, jail_base=self.host.settings.jail_base)
            disk = await disks.ensure(DataDiskSpec(self.ref, self.data_disk_mib, self._disk))
            self._disk = disk.identity
            files.append(JailFile("data.ext4", disk.path, writable=True))
        overhead = self.host.settings.limits.vmm_overhead_mib
        await self._cgroups.ensure(
            CgroupSpec(
                self.ref.tenant_id,
                self.jail_id,
                memory_max_bytes=(self.mem_mib + overhead) * MIB,
                cpu_quota_us=CPU_PERIOD_US,
                pids_max=PIDS_PER_VMM,
            )
        )
        await self._jails.ensure(
            JailSpec(self.ref, self.jail_id, self.uid, tuple(files), config=b"{}\n")
        )
        await self.network.taps.ensure(
            TapSpec(
                self.tap,
                self.net.bridge_name,
                self.uid,
                naming.mac_address(self.net.tenant_net_id, self.offset),
                naming.guest_ip(self.net, self.offset),
                f"hostd:{self.ref}",
            )
        )

    def start_job(self) -> dict[str, Any]:
        """What hostd's StartInstance asks of jailer, API and agent."""
        calls = [
            (method, path, msgspec.to_builtins(body))
            for method, path, body in boot_requests(self._config(), parse_version(VERSION))
        ]
        return self._job([*calls, START_CALL], ["Ping"])

    def wake_job(self) -> dict[str, Any]:
        """What hostd's WakeInstance asks; the snapshot must have been linked."""
        body = {
            "snapshot_path": f"/{WOKEN}/state",
            "mem_backend": {"backend_type": "File", "backend_path": f"/{WOKEN}/mem"},
            "resume_vm": False,
        }
        clock = {"SetClock": {"unix_nanos": 1_900_000_000_000_000_000}}
        return self._job([("PUT", "/snapshot/load", body), RESUME_CALL], ["Wake", clock])

    def sleep_job(self) -> dict[str, Any]:
        """To be run once, on a started VM: leaves state and memory in the jail."""
        body = {"snapshot_type": "Full", "snapshot_path": "/state", "mem_file_path": "/mem"}
        job = self._job([PAUSE_CALL, ("PUT", "/snapshot/create", body)], [])
        return job | {"jailer": []}

    def _job(self, calls: list[Any], agent: list[object]) -> dict[str, Any]:
        jailer = self._jailer.arguments(self.spec)
        return {"root": str(self.root), "jailer": jailer, "calls": calls, "agent": agent}

    def keep_snapshot(self) -> None:
        """Take state and memory out of the jail, for all later wakes."""
        self.snapshot.mkdir()
        for name in ("state", "mem"):
            os.rename(self.root / name, self.snapshot / name)
            os.chown(self.snapshot / name, 0, self.uid)
            os.chmod(self.snapshot / name, 0o440)

    def link_snapshot(self) -> None:
        """Into the prepared jail, as hostd links it."""
        woken = self.root / WOKEN
        woken.mkdir(mode=0o750)
        os.chown(woken, 0, self.uid)
        for name in ("state", "mem"):
            os.link(self.snapshot / name, woken / name)

    async def clear(self) -> None:
        """End the VMM, then remove its TAP, jail and cgroup."""
        pids = self._cgroups.tree.pids(self.spec.cgroup)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self._cgroups.tree.pids(self.spec.cgroup):
            await asyncio.sleep(0.002)
        await self.network.taps.remove(self.tap)
        await self._jails.remove(self.jail_id)
        await self._cgroups.remove(f"{self.ref.tenant_id}/{self.jail_id}")

    def _config(self) -> BootConfig:
        drives = [
            DriveConfig("rootfs", ROOTFS, read_only=True, root_device=True),
            DriveConfig("config", CONFIG_DRIVE, read_only=True),
        ]
        if self.data_disk_mib:
            drives.append(DriveConfig("data", DATA, read_only=False))
        guest_ip = naming.guest_ip(self.net, self.offset)
        address = f"ip={guest_ip}::{self.net.gateway_ip}:{naming.netmask(self.net)}::eth0:off"
        return BootConfig(
            vcpus=1,
            mem_mib=self.mem_mib,
            kernel=KERNEL,
            initrd=None,
            boot_args=f"reboot=k panic=1 {address}",
            drives=tuple(drives),
            tap=self.tap,
            mac=naming.mac_address(self.net.tenant_net_id, self.offset),
            vsock=VSOCK,
        )


class BareVms:
    """The VMs of a measurement, made with one set of network mechanisms."""

    def __init__(self, host: LiveHost, net: TenantNet, revision: str, **size: int) -> None:
        self._host = host
        self._net = net
        self._revision = revision
        self._size = size
        self._network = open_network_mechanisms(host.settings.network)
        self.all: list[BareVm] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._network.close()
        for bare_vm in self.all:
            shutil.rmtree(bare_vm.snapshot, ignore_errors=True)

    def add(self, name: str, offset: int) -> BareVm:
        ref = InstanceRef("acme", "web", name)
        bare_vm = BareVm(
            self._host, self._net, ref, offset, self._revision, network=self._network, **self._size
        )
        self.all.append(bare_vm)
        return bare_vm
