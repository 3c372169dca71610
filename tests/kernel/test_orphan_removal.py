"""Every kind of orphan on this kernel: removed if nothing uses it, else left as it is."""

import asyncio
import fcntl
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from handlers.claims.orphan import Orphan
from handlers.errors import Conflict, Invalid
from handlers.host.inventory import Inventory, collect
from handlers.host.jail.jails import Jails
from handlers.host.net.host_network import NetworkMechanisms, open_network_mechanisms
from handlers.host.net.taps import FLAGS, TUN_DEVICE, TUNSETIFF
from handlers.host.orphans import QUIET_S, OrphanRemoval
from handlers.host.snapshot.snapshots import Snapshots
from handlers.host.storage.artifacts import Artifacts
from handlers.host.vmm.cgroups import Cgroups
from handlers.specs import BridgeSpec, PinSpec, TapSpec, TenantRulesSpec
from schemas.requests import InstanceRef
from schemas.settings import LimitSettings, NetworkSettings, PathSettings, Settings
from tests.kernel.net.netns import Namespace
from tests.kernel.net.plans import net_of
from tests.kernel.test_inventory import CHROOTED, running
from worker.reconcile.orphans import REMOVED

NET = net_of(7)
PIN = PinSpec("tn7i3", "02:fc:00:07:00:03", "10.240.7.3")
TAP = TapSpec(PIN.tap, NET.bridge_name, os.getuid(), PIN.mac, PIN.guest_ip, "hostd:acme/web/i-1")
JAIL = "0123456789ab-1"


class Desk:
    """One host without a worker, in a namespace and directories of its own."""

    def __init__(self, top: Path) -> None:
        (top / "data/tenants/acme/pools/web").mkdir(parents=True)
        (top / "state").mkdir()
        self.namespace = Namespace()
        self.settings = Settings(
            paths=PathSettings(data=f"{top}/data", state=f"{top}/state"),
            limits=LimitSettings(cgroup=f"hostd-test-{os.getpid()}-orphans", enforce=False),
        )
        self.network: NetworkMechanisms = open_network_mechanisms(
            NetworkSettings(), self.namespace.enter
        )
        paths = self.settings.paths
        self.cgroups = Cgroups(self.settings)
        self.snapshots = Snapshots(
            data=paths.data,
            state=paths.state,
            jail_base=self.settings.jail_base,
            cpu_model="x",
            kernel_release="y",
        )
        self.referred: set[str] = set()
        self.removal = OrphanRemoval(
            paths,
            self.network,
            self.cgroups,
            Jails(data=paths.data, state=paths.state, jail_base=self.settings.jail_base),
            Artifacts(data=paths.data, state=paths.state, in_use=self.referred.__contains__),
            self.snapshots,
        )

    @property
    def state(self) -> Path:
        return Path(self.settings.paths.state)

    @property
    def tree(self) -> Path:
        return Path(self.cgroups.tree.path(self.cgroups.tree.base))

    @property
    def jail_root(self) -> Path:
        return Path(self.settings.jail_base, "firecracker", JAIL, "root")

    async def inventory(self) -> Inventory:
        return await asyncio.to_thread(collect, self.settings, enter=self.namespace.enter)

    async def remove(self, kind: str, name: str) -> None:
        await self.removal.remove(Orphan(kind, name))

    def close(self) -> None:
        self.snapshots.close()
        self.network.close()
        self.namespace.close()
        for path, _, _ in os.walk(self.tree, topdown=False):
            os.rmdir(path)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.close()


async def test_each_kind_that_may_be_an_orphan_can_be_removed(desk: Desk) -> None:
    assert desk.removal.kinds == set(REMOVED)
    with pytest.raises(Invalid):
        await desk.remove("processes", "1")


async def set_up(desk: Desk) -> None:
    await desk.network.networks.prepare()
    await desk.network.tenant_rules.ensure(TenantRulesSpec("acme", NET))
    await desk.network.bridges.ensure(BridgeSpec("acme", NET))
    await desk.network.pins.ensure(PIN)
    await desk.network.taps.ensure(TAP)


async def test_a_network_is_removed_from_its_taps_to_its_rules(desk: Desk) -> None:
    await set_up(desk)
    before = await desk.inventory()
    assert (before.taps, before.bridges, len(before.nft)) == ((TAP.name,), (NET.bridge_name,), 5)

    with pytest.raises(Conflict, match="has ports: tn7i3"):
        await desk.remove("bridges", NET.bridge_name)
    for element in before.nft:
        with pytest.raises(Conflict, match="exists"):
            await desk.remove("nft", element)
    assert await desk.inventory() == before

    for kind in ("taps", "bridges", "nft"):
        for name in getattr(before, kind):
            await desk.remove(kind, name)
            await desk.remove(kind, name)  # absent is success
    assert await desk.inventory() == Inventory()


async def test_a_tap_that_a_process_has_open_stays(desk: Desk) -> None:
    await set_up(desk)
    before = await desk.inventory()

    def attach() -> int:
        desk.namespace.enter()
        descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", TAP.name.encode(), FLAGS))
        return descriptor

    descriptor = await in_own_thread(attach)
    try:
        with pytest.raises(Conflict, match="in use by another process"):
            await desk.remove("taps", TAP.name)
        assert await desk.inventory() == before
        assert await desk.network.taps.ensure(TAP) is False  # nothing of it was changed
    finally:
        os.close(descriptor)
    await desk.remove("taps", TAP.name)
    assert (await desk.inventory()).taps == ()


async def in_own_thread(work: Callable[[], int]) -> int:
    """In a thread that ends with it: it is in another namespace afterwards."""
    with ThreadPoolExecutor(1) as thread:
        return await asyncio.wrap_future(thread.submit(work))


async def test_a_foreign_interface_or_element_is_not_touched(desk: Desk) -> None:
    await desk.network.networks.prepare()
    desk.namespace.ip("tuntap add tn7i3 mode tap")
    desk.namespace.ip("link add br-tenant-7 type bridge")
    desk.namespace.ip("link set br-tenant-7 alias theirs")

    await desk.remove("taps", "tn7i3")
    await desk.remove("bridges", "br-tenant-7")
    for element in ("inet uplinks eth0", "ip nat x", "bridge guests"):
        with pytest.raises(Invalid):
            await desk.remove("nft", element)

    listed = desk.namespace.ip("-br link show")
    assert "tn7i3" in listed
    assert "br-tenant-7" in listed


async def test_a_cgroup_is_removed_unless_something_is_in_it(desk: Desk) -> None:
    leaf = desk.tree / "acme" / JAIL
    leaf.mkdir(parents=True)
    (desk.tree / "umbra").mkdir()
    base = desk.cgroups.tree.base
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        (leaf / "cgroup.procs").write_text(str(child.pid))
        for name in (f"{base}/acme/{JAIL}", f"{base}/acme"):
            with pytest.raises(Conflict, match="a process or another cgroup"):
                await desk.remove("cgroups", name)
        child.kill()
    (desk.tree / "acme" / "other").mkdir()

    await desk.remove("cgroups", f"{base}/acme/{JAIL}")
    assert (await desk.inventory()).cgroups == (f"{base}/acme/other", f"{base}/umbra")
    await desk.remove("cgroups", f"{base}/acme/other")  # with its tenant's directory
    await desk.remove("cgroups", f"{base}/umbra")

    assert (await desk.inventory()).cgroups == ()
    for name in (base, "system.slice", f"{base}/../system.slice", f"{base}/acme/../.."):
        with pytest.raises(Invalid):
            await desk.remove("cgroups", name)


async def test_a_jail_is_removed_unless_it_is_the_root_of_a_process(desk: Desk) -> None:
    desk.jail_root.mkdir(parents=True)
    (desk.jail_root / "log").write_bytes(b"x")

    with running(sys.executable, "-c", CHROOTED, str(desk.jail_root)) as process:
        with pytest.raises(Conflict, match=f"root directory of process {process.pid}"):
            await desk.remove("jails", JAIL)
        assert (desk.jail_root / "log").read_bytes() == b"x"

    await desk.remove("jails", JAIL)
    assert (await desk.inventory()).jails == ()


async def test_a_jail_with_the_only_name_of_a_data_disk_stays(desk: Desk) -> None:
    desk.jail_root.mkdir(parents=True)
    disk = desk.jail_root / "data.ext4"
    disk.write_bytes(b"precious")

    with pytest.raises(Conflict, match="the only name of a data disk"):
        await desk.remove("jails", JAIL)
    assert disk.read_bytes() == b"precious"

    os.link(disk, desk.state / "saved")
    await desk.remove("jails", JAIL)
    assert (desk.state / "saved").read_bytes() == b"precious"


async def test_a_stale_snapshot_is_deleted(desk: Desk) -> None:
    number = desk.state / "snapshots/acme/web/i-1/3"
    number.mkdir(parents=True)
    for name in ("state", "mem", "manifest.json"):
        (number / name).write_bytes(b"x")
    assert (await desk.inventory()).snapshots == ("acme/web/i-1/3",)

    await desk.remove("snapshots", "acme/web/i-1/3")

    assert await desk.snapshots.read(InstanceRef("acme", "web", "i-1")) is None
    assert (await desk.inventory()).snapshots == ()


async def test_an_artifact_is_removed_unless_an_instance_refers_to_it(desk: Desk) -> None:
    for revision in ("abc", "def"):
        (desk.state / "artifacts/acme/web" / revision).mkdir(parents=True)
    desk.referred.add("acme/web/abc")

    for name in (await desk.inventory()).artifacts:
        await desk.remove("artifacts", name)

    assert (await desk.inventory()).artifacts == ("acme/web/abc",)


async def test_temporary_files_are_removed_once_they_are_not_written_any_more(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = Path(desk.settings.paths.data, "tenants/acme/pools/web/instances/i-1")
    files = [
        desk.state / "artifacts/acme/web/.def.part/vmlinux",
        desk.state / "logs/acme/web/i-1/.2.log",
        desk.state / "x.json.part",
        desk.state / "snapshots/acme/web/i-1/2/mem",
        instance / ".instance.json.hostd",
    ]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (instance / "instance.json").write_text("{}")
    before = (await desk.inventory()).temp
    assert len(before) == len(files)

    for name in before:
        with pytest.raises(Conflict, match="changed within the last"):
            await desk.remove("temp", name)
    later = time.time() + QUIET_S + 1
    monkeypatch.setattr(time, "time", lambda: later)
    for name in before:
        await desk.remove("temp", name)
        with pytest.raises(Conflict, match="not there any more"):  # that is no removal
            await desk.remove("temp", name)

    assert (await desk.inventory()).temp == ()
    assert (instance / "instance.json").exists()


async def test_a_directory_that_is_not_named_as_a_snapshot_of_hostds_is_kept(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = desk.state / "snapshots/Acme/web/i-1/2"
    foreign.mkdir(parents=True)
    later = time.time() + QUIET_S + 1
    monkeypatch.setattr(time, "time", lambda: later)

    with pytest.raises(Conflict, match="is not named"):
        await desk.remove("temp", str(foreign))

    gone = f"{desk.settings.paths.data}/tenants/acme/pools/gone/.x.hostd"
    with pytest.raises(Conflict, match="not there any more"):
        await desk.remove("temp", gone)


@pytest.mark.parametrize(
    "path", ["/etc/x.part", "{state}/../x.part", "{data}/tenants/acme/../../x.hostd"]
)
async def test_a_path_outside_of_hostds_directories_is_refused(desk: Desk, path: str) -> None:
    paths = desk.settings.paths
    target = path.format(state=paths.state, data=paths.data)
    outside = Path(paths.state).parent / "x.part"
    outside.write_bytes(b"x")

    with pytest.raises(Invalid):
        await desk.remove("temp", target)

    assert outside.exists()


async def test_agentds_symlink_in_a_temporary_path_is_not_followed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = Path(desk.settings.paths.data, "tenants/acme")
    outside = Path(desk.settings.paths.data).parent / "outside"
    outside.mkdir()
    (outside / ".instance.json.hostd").write_bytes(b"x")
    (tenant / "pools/evil").symlink_to(outside)
    later = time.time() + QUIET_S + 1
    monkeypatch.setattr(time, "time", lambda: later)

    with pytest.raises(Invalid, match="symlink"):
        await desk.remove("temp", f"{tenant}/pools/evil/.instance.json.hostd")

    assert (outside / ".instance.json.hostd").exists()
