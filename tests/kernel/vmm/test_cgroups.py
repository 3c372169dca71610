"""Leaves in the real cgroup2 tree. Limits need its controllers: they are tested in the lab."""

import asyncio
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.errors import HostFault, Invalid, Unavailable
from handlers.host.linux.procfs import Mount
from handlers.host.vmm import cgroups as module
from handlers.host.vmm.cgroups import Cgroups, find_mount
from handlers.specs import CgroupSpec
from schemas.settings import LimitSettings, Settings

MIB = 1024 * 1024


@pytest.fixture
def base() -> Iterator[str]:
    name = f"hostd-test-{os.getpid()}-cg"
    yield name
    path = f"{find_mount()}/{name}"
    if os.path.isdir(path):
        os.rmdir(path)


@pytest.fixture
def mechanism(base: str) -> Cgroups:
    return Cgroups(Settings(limits=LimitSettings(enforce=False, cgroup=base)))


def spec(jail_id: str = "a1-1", tenant: str = "acme") -> CgroupSpec:
    return CgroupSpec(tenant, jail_id, 64 * MIB, 50_000, 32)


async def test_a_leaf_is_made_once_and_removed_with_its_tenants_directory(
    mechanism: Cgroups,
) -> None:
    await mechanism.ensure(spec())
    await mechanism.ensure(spec())
    assert await mechanism.exists("acme/a1-1")

    await mechanism.remove("acme/a1-1")
    await mechanism.remove("acme/a1-1")

    assert not await mechanism.exists("acme/a1-1")
    assert os.listdir(mechanism.tree.path(mechanism.tree.base)).count("acme") == 0


async def test_the_tenants_directory_stays_while_another_leaf_is_in_it(mechanism: Cgroups) -> None:
    await mechanism.ensure(spec("a1-1"))
    await mechanism.ensure(spec("b2-1"))

    await mechanism.remove("acme/a1-1")

    assert await mechanism.exists("acme/b2-1")
    assert list(mechanism.tree.leaves("b2-1")) == [mechanism.tree.name("acme", "b2-1")]
    assert list(mechanism.tree.leaves("b2-1", "acme")) == [mechanism.tree.name("acme", "b2-1")]
    assert list(mechanism.tree.leaves("b2-1", "umbra")) == []
    await mechanism.remove("acme/b2-1")


async def test_leaves_of_one_tenant_are_made_and_removed_concurrently(mechanism: Cgroups) -> None:
    async def come_and_go(number: int) -> None:
        for _ in range(10):
            await mechanism.ensure(spec(f"j-{number}"))
            assert await mechanism.exists(f"acme/j-{number}")
            await mechanism.remove(f"acme/j-{number}")

    await asyncio.gather(*(come_and_go(number) for number in range(6)))

    assert "acme" not in os.listdir(mechanism.tree.path(mechanism.tree.base))


async def test_a_leaf_with_a_process_is_not_removed_and_the_error_names_the_pid(
    mechanism: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EMPTY_TIMEOUT_S", 0.05)
    await mechanism.ensure(spec())
    leaf = mechanism.tree.name("acme", "a1-1")
    with subprocess.Popen(["sleep", "30"]) as child:
        with open(f"{mechanism.tree.path(leaf)}/cgroup.procs", "w") as procs:
            procs.write(str(child.pid))
        assert mechanism.tree.pids(leaf) == [child.pid]

        with pytest.raises(Unavailable) as refused:
            await mechanism.remove("acme/a1-1")

        assert refused.value.detail["pids"] == [child.pid]
        assert child.poll() is None
        child.kill()
    await mechanism.remove("acme/a1-1")


async def test_removal_waits_for_the_last_process_to_exit(mechanism: Cgroups) -> None:
    await mechanism.ensure(spec())
    leaf = mechanism.tree.name("acme", "a1-1")
    with subprocess.Popen(["sleep", "30"]) as child:
        with open(f"{mechanism.tree.path(leaf)}/cgroup.procs", "w") as procs:
            procs.write(str(child.pid))
        kill = threading.Timer(0.05, child.kill)
        kill.start()

        await mechanism.remove("acme/a1-1")

        kill.join()
    assert not await mechanism.exists("acme/a1-1")


async def test_enforced_limits_without_controllers_are_refused_by_name_and_nothing_is_left(
    base: str,
) -> None:
    if {"cpu", "memory", "pids"} <= set(
        Path(find_mount(), "cgroup.controllers").read_text().split()
    ):
        pytest.skip("this host has the controllers: the lab tests the limits")
    enforcing = Cgroups(Settings(limits=LimitSettings(enforce=True, cgroup=base)))

    with pytest.raises(HostFault, match="cpu, memory, pids"):
        await enforcing.ensure(spec())

    assert not os.path.exists(enforcing.tree.path(base))


async def test_the_cpu_that_a_leafs_processes_used_is_counted(mechanism: Cgroups) -> None:
    await mechanism.ensure(spec())
    before = await mechanism.usage("acme/a1-1")
    path = mechanism.tree.path(mechanism.tree.name("acme", "a1-1"))
    burn = f"echo $$ > {path}/cgroup.procs; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"

    subprocess.run(["sh", "-c", burn], check=True, timeout=30)

    after = await mechanism.usage("acme/a1-1")
    await mechanism.remove("acme/a1-1")
    assert before is not None
    assert after is not None
    assert after.cpu_us > before.cpu_us
    assert await mechanism.usage("acme/a1-1") is None


@pytest.mark.parametrize("key", ["acme", "../x/y", "acme/..", "acme/a/b", "/a", "acme/", ""])
async def test_an_invalid_key_is_refused(mechanism: Cgroups, key: str) -> None:
    with pytest.raises(Invalid):
        await mechanism.remove(key)


@pytest.mark.parametrize("cgroup", ["..", "a/../b", "", "a//b"])
def test_an_invalid_base_is_refused(cgroup: str) -> None:
    with pytest.raises(Invalid):
        Cgroups(Settings(limits=LimitSettings(enforce=False, cgroup=cgroup)))


def test_the_cgroup2_mount_is_found_under_any_name() -> None:
    mounts = [Mount("0:28", "/sys/fs/cgroup", "tmpfs"), Mount("0:37", "/mnt/a b", "cgroup2")]

    assert find_mount(mounts) == "/mnt/a b"


def test_a_host_without_a_cgroup2_mount_is_a_host_fault() -> None:
    with pytest.raises(HostFault, match="cgroup2"):
        find_mount([Mount("0:28", "/", "ext4")])
