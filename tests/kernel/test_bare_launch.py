"""What the bare script makes for a launch is what hostd makes, so its CPU time is comparable."""

import os
import stat
import types
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from bench.raw import bare
from bench.raw.bare_instance import BareInstance
from handlers.host.jail.jails import Jails
from handlers.host.net.taps import verify_tap
from handlers.host.vmm.cgroups import Cgroups
from handlers.jail_names import (
    CONFIG_DRIVE,
    DATA_DISK,
    KERNEL,
    LOG,
    MEMORY,
    ROOTFS,
    STATE,
    WOKEN_DIR,
)
from handlers.specs import BridgeSpec, JailSpec
from schemas.settings import LimitSettings, NetworkSettings, PathSettings, Settings
from tests.kernel.net.netns import HostNet
from tests.kernel.net.plans import net_of
from tests.kernel.storage.store_host import REF, REVISION, make_world
from tests.live_host import LiveHost

NET = net_of(7)
OFFSET = 5
OF_A_JAIL = {KERNEL, ROOTFS, DATA_DISK, CONFIG_DRIVE, LOG, "."}


@dataclass
class Stage:
    """A host with the tenant's bridge; `instance` is launched on it."""

    net: HostNet
    settings: Settings
    instance: BareInstance

    async def make(self, *, wakes: bool = False) -> None:
        """In the host's namespace, as the script does."""
        making = await self.instance.making(wakes=wakes)
        self.net.host.run(lambda: bare.make(making))

    @property
    def jails(self) -> Jails:
        paths = self.settings.paths
        return Jails(data=paths.data, state=paths.state, jail_base=self.settings.jail_base)


@pytest.fixture
async def stage(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    """The parameter: whether guests are isolated."""
    world = make_world(tmp_path)
    settings = Settings(
        paths=PathSettings(data=str(world.data), state=str(world.state)),
        limits=LimitSettings(enforce=False, cgroup=f"hostd-test-{os.getpid()}-bare"),
        network=NetworkSettings(isolate_guests=getattr(request, "param", False)),
    )
    host = cast("LiveHost", types.SimpleNamespace(settings=settings, directory=str(tmp_path)))
    cgroups = Cgroups(settings)
    base = cgroups.tree.path(cgroups.tree.base)
    os.mkdir(base)
    os.makedirs(f"{settings.jail_base}/firecracker")
    try:
        with HostNet(settings.network) as net:
            await net.mechanisms.bridges.ensure(BridgeSpec(REF.tenant_id, NET))
            instance = BareInstance(host, NET, REF, OFFSET, REVISION, 32, 8, net.mechanisms)
            try:
                yield Stage(net, settings, instance)
            finally:
                await instance.clear()
    finally:
        os.rmdir(base)


@pytest.mark.parametrize("stage", [False, True], ids=["talk", "isolated"], indirect=True)
async def test_hostd_accepts_the_tap(stage: Stage) -> None:
    await stage.make()
    tap = stage.instance.tap_spec
    isolate = stage.settings.network.isolate_guests

    await stage.net.mechanisms.netlink.run(
        lambda kernel: verify_tap(kernel, tap, kernel.existing_link(tap.bridge), isolate=isolate)
    )
    assert not await stage.net.mechanisms.taps.ensure(tap)
    assert (await stage.net.mechanisms.taps.owners())[tap.name].instance == str(REF)


async def test_the_jail_is_as_hostds(stage: Stage) -> None:
    await stage.make()
    instance = stage.instance
    barely = files_of(instance.root)
    jail_id, files = instance.jail_id, tuple(await instance._files())
    await instance.clear()

    spec = JailSpec(REF, jail_id, instance.uid, files, config=b"{}\n")
    await stage.jails.ensure(spec)

    assert barely == files_of(instance.root)
    assert barely.keys() == OF_A_JAIL


async def test_the_cgroup_is_there_and_what_was_made_is_removed_by_hostd(stage: Stage) -> None:
    await stage.make()
    instance = stage.instance
    cgroups = Cgroups(stage.settings)

    assert await cgroups.exists(instance.cgroup_key)
    assert os.stat(instance.root / DATA_DISK).st_uid == instance.uid
    await instance.clear()

    assert not await cgroups.exists(instance.cgroup_key)
    assert not await stage.net.mechanisms.taps.exists(instance.tap)
    assert await stage.jails.list_ids() == []
    (disk,) = [file.source for file in await instance._files() if file.writable]
    assert os.stat(disk).st_uid == 0


async def test_a_woken_vmm_may_read_its_snapshot_and_not_write_it(stage: Stage) -> None:
    instance = stage.instance
    instance.snapshot.mkdir()
    for name in (STATE, MEMORY):
        (instance.snapshot / name).write_bytes(b"saved")

    await stage.make(wakes=True)

    woken = {f"{WOKEN_DIR}/{name}": (0o100440, 0, instance.uid, 2) for name in (STATE, MEMORY)}
    found = files_of(instance.root)
    assert {path: fact[:4] for path, fact in found.items() if path in woken} == woken
    assert found[WOKEN_DIR][:3] == (0o040750, 0, instance.uid)


def files_of(root: Path) -> dict[str, tuple[int, int, int, int, int]]:
    """By path: type and mode, owner, group, links, size; the size of a directory is nothing."""
    found: dict[str, tuple[int, int, int, int, int]] = {}
    for path in [root, *root.rglob("*")]:
        at = path.lstat()
        size = at.st_size if stat.S_ISREG(at.st_mode) else 0
        found[str(path.relative_to(root))] = (at.st_mode, at.st_uid, at.st_gid, at.st_nlink, size)
    return found
