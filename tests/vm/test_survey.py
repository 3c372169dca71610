"""What a running VMM lacks of its jail, with real VMMs: named, and nothing else is."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from handlers.specs import CgroupSpec, LaunchSpec, NicConfig
from schemas.records import VmmIdentity
from tests.vm import payload
from tests.vm.vmm_rig import MAC, TAP, UID, VmmRig, add_tap


async def started(rig: VmmRig, tap: str = TAP) -> tuple[LaunchSpec, VmmIdentity]:
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)
    config = dataclasses.replace(rig.boot_config(spec, payload.HALT), nic=NicConfig(tap, MAC))
    api = rig.vmms.api(spec.jail_id)
    try:
        await api.configure(config)
        await api.start()
    finally:
        await api.close()
    return spec, identity


def unlink(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def another_socket(root: Path) -> None:
    (root / "v.sock").unlink()
    (root / "v.sock").write_text("no socket")


def another_executable(root: Path) -> None:
    data = (root / "firecracker").read_bytes()
    (root / "firecracker").unlink()
    (root / "firecracker").write_bytes(data)


def move_away(root: Path) -> None:
    root.rename(root.with_name("moved"))
    root.mkdir()


@pytest.mark.parametrize(
    ("harm", "lacking"),
    [
        (unlink("api.sock"), ["api.sock"]),
        (unlink("v.sock"), ["v.sock"]),
        (another_socket, ["v.sock"]),
        (unlink("firecracker"), ["firecracker"]),
        (another_executable, ["firecracker"]),
        (move_away, ["its directory"]),
    ],
    ids=["api", "vsock", "file", "executable", "copy", "directory"],
)
async def test_what_was_removed_from_a_live_jail_is_named(
    rig: VmmRig, harm: Callable[[Path], None], lacking: list[str]
) -> None:
    spec, identity = await started(rig)
    add_tap("tn1i4", UID)
    whole, other = await started(rig, "tn1i4")
    vmms = {spec.jail_id: identity, whole.jail_id: other}
    assert await rig.vmms.lacking(vmms) == {}
    root = rig.root(spec)

    harm(root)

    assert await rig.vmms.lacking(vmms) == {spec.jail_id: lacking}
    if lacking == ["its directory"]:
        root.rmdir()
        root.with_name("moved").rename(root)


async def test_a_vmm_that_was_moved_to_another_cgroup_is_named(rig: VmmRig) -> None:
    spec, identity = await started(rig)
    elsewhere = CgroupSpec("acme", "elsewhere", 256 << 20, 100_000, 64)
    await rig.cgroups.ensure(elsewhere)
    try:
        rig.tree.move(identity.pid, rig.tree.name("acme", "elsewhere"))

        assert await rig.vmms.lacking({spec.jail_id: identity}) == {spec.jail_id: ["its cgroup"]}
    finally:
        rig.tree.move(identity.pid, spec.cgroup)
        await rig.cgroups.remove(elsewhere.key)


async def test_a_vmm_that_exited_lacks_nothing(rig: VmmRig) -> None:
    spec, identity = await started(rig)
    os.unlink(rig.root(spec) / "api.sock")

    await rig.vmms.remove(spec.jail_id)

    assert await rig.vmms.lacking({spec.jail_id: identity}) == {}
