"""A small host for VMM tests: state, jails, cgroups and a network namespace, removed afterwards.

The rig makes the jail's files, which hostd's `jails` would make: these tests are about the VMM and
need nothing else of hostd.
"""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from handlers.host.vmm.cgroups import Cgroups, CgroupTree
from handlers.host.vmm.guest_agent import GuestAgents
from handlers.host.vmm.vmms import Vmms
from handlers.specs import BootConfig, CgroupSpec, DriveConfig, LaunchSpec, NicConfig
from schemas.settings import HostSettings, LimitSettings, PathSettings, Settings, VmmSettings
from tests.guests.firecracker import FIRECRACKER, JAILER
from tests.vm import payload

MIB = 1024 * 1024
TAP = "tn1i3"
MAC = "02:fc:00:01:00:03"
GUEST_IP, HOST_IP = "10.240.1.3", "10.240.1.1"
BOOT_ARGS = f"reboot=k panic=1 ip={GUEST_IP}::{HOST_IP}:255.255.255.0::eth0:off"
MINI = FIRECRACKER.parents[1] / "guests" / "mini"
UID = 2_000_000_001

_numbers = itertools.count(1)


def need(*paths: str | os.PathLike[str]) -> None:
    """Skip without these, but fail in CI."""
    missing = [str(path) for path in paths if not os.path.exists(path)]
    if missing and os.environ.get("CI"):
        pytest.fail(f"needs {', '.join(missing)}")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def add_tap(name: str, owner: int) -> None:
    subprocess.run(
        ["ip", "tuntap", "add", name, "mode", "tap", "user", str(owner)], check=True, timeout=10
    )
    subprocess.run(["ip", "link", "set", name, "up"], check=True, timeout=10)


@dataclass
class VmmRig:
    directory: Path
    settings: Settings
    cgroups: Cgroups
    vmms: Vmms
    agents: GuestAgents
    tree: CgroupTree
    launches: list[LaunchSpec] = field(default_factory=list[LaunchSpec])

    async def prepare(self, uid: int = UID, *, tenant: str = "acme") -> LaunchSpec:
        """A jail's root with a log, and its cgroup leaf."""
        jail_id = f"{os.getpid():012x}-{next(_numbers)}"
        spec = LaunchSpec(jail_id, uid, self.tree.name(tenant, jail_id))
        await self.cgroups.ensure(CgroupSpec(tenant, jail_id, 256 * MIB, 100_000, 64))
        self.launches.append(spec)
        root = self.root(spec)
        root.mkdir(parents=True, mode=0o700)
        os.chown(root, uid, uid)
        self.put(spec, "log", b"")
        return spec

    def root(self, spec: LaunchSpec) -> Path:
        return Path(self.settings.jail_base, "firecracker", spec.jail_id, "root")

    def put(self, spec: LaunchSpec, name: str, content: bytes | Path) -> None:
        """A file in the jail that belongs to its uid."""
        path = self.root(spec) / name
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
        os.chown(path, spec.uid, spec.uid)

    def boot_config(self, spec: LaunchSpec, code: bytes | None = None) -> BootConfig:
        """The mini guest with its rootfs and a data disk; with `code`, only that."""
        drives: tuple[DriveConfig, ...] = ()
        if code is None:
            need(MINI / "vmlinux")
            self.put(spec, "vmlinux", MINI / "vmlinux")
            self.put(spec, "rootfs", MINI / "rootfs.ext4")
            self.put(spec, "data", bytes(MIB))
            drives = (
                DriveConfig("rootfs", "/rootfs", read_only=True),
                DriveConfig("data", "/data", read_only=False),
            )
        else:
            self.put(spec, "vmlinux", payload.write(self.directory / "payload.elf", code))
        return BootConfig(
            vcpus=1,
            mem_mib=32,
            kernel="/vmlinux",
            initrd=None,
            boot_args=BOOT_ARGS,
            drives=drives,
            nic=NicConfig(TAP, MAC),
            vsock="/v.sock",
        )

    async def remove(self, spec: LaunchSpec) -> None:
        await self.vmms.remove(spec.jail_id)
        await self.cgroups.remove(spec.cgroup.split("/", 1)[1])
        shutil.rmtree(self.root(spec).parent, ignore_errors=True)


@contextlib.asynccontextmanager
async def vmm_rig(directory: Path, *, enforce: bool = False) -> AsyncGenerator[VmmRig]:
    """A host below `directory`; whatever was prepared is removed at the end."""
    need(FIRECRACKER, JAILER, "/dev/kvm", "/dev/net/tun")
    base = f"hostd-test-{os.getpid()}-{next(_numbers)}"
    settings = Settings(
        host=HostSettings(production=False),
        paths=PathSettings(data=f"{directory}/mvm", state=str(directory), run=f"{directory}/run"),
        vmm=VmmSettings(firecracker=str(FIRECRACKER), jailer=str(JAILER)),
        limits=LimitSettings(enforce=enforce, cgroup=base),
    )
    Path(settings.jail_base).mkdir(parents=True)
    cgroups = Cgroups(settings)
    made = VmmRig(directory, settings, cgroups, Vmms(settings), GuestAgents(settings), cgroups.tree)
    try:
        yield made
    finally:
        for spec in made.launches:
            await made.remove(spec)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(made.tree.path(base))


def udp_echo(content: bytes) -> bytes:
    """What the guest's echo port sends back; called in the guest's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(5)
        udp.sendto(content, (GUEST_IP, 7))
        return udp.recv(2048)
