"""VMMs launched ahead, with the real jailer and Firecracker: what a launch that takes one gets."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from handlers.errors import HostFault, Invalid, Unavailable
from handlers.host.jail.warm_jails import WarmJails
from handlers.host.vmm.binaries import VmmBinaries
from handlers.host.vmm.warm_pool import WarmPool
from handlers.host.vmm.warm_vmms import WarmVmms
from handlers.specs import MIB, CgroupSpec, LaunchSpec
from schemas import naming
from schemas.records import VmmIdentity
from tests.guests.firecracker import VERSION
from tests.kernel.storage.store_host import REF
from tests.vm.store_rig import PORT, StoreRig
from tests.vm.vmm_rig import UID, VmmRig

SLOT, UIDS = UID - 2_000_000_000, 64


class Pooled:
    """A pool over the rig, with its run in the background."""

    def __init__(self, rig: VmmRig, size: int = 1, cores: int = 2) -> None:
        self.rig = rig
        vmm = msgspec.structs.replace(rig.settings.vmm, warm_pool=size, uid_count=UIDS)
        self.settings = msgspec.structs.replace(rig.settings, vmm=vmm)
        self.free_mib = 1024
        self.binaries = VmmBinaries(self.settings)
        self.pool = WarmPool(
            self.settings, self.has_slot, lambda: self.free_mib, cores, self.binaries
        )
        self.task: asyncio.Task[None] | None = None

    def has_slot(self, slot: int) -> bool:
        """Those up to the rig's, which other launches of the test have."""
        return slot <= SLOT

    def claim(self, store: StoreRig, number: int) -> None:
        """For this launch, which gets its uid."""
        slot = self.pool.claim(naming.jail_id(REF, number), VERSION)
        assert slot is not None
        store.change_uid(self.settings.vmm.uid_base + slot)

    def start(self) -> None:
        self.task = asyncio.create_task(self.pool.run(lambda: True))

    async def until(self, **counts: int) -> None:
        async with asyncio.timeout(20):
            while not counts.items() <= {**self.pool.counts(), **self.pool.totals}.items():
                await asyncio.sleep(0.005)

    def leaves(self) -> dict[str, list[int]]:
        """Warm cgroups and their processes."""
        top = Path(self.rig.tree.path(f"{self.rig.tree.base}/{naming.WARM_CGROUP}"))
        found = sorted(top.iterdir()) if top.exists() else []
        return {
            leaf.name: [int(pid) for pid in (leaf / "cgroup.procs").read_text().split()]
            for leaf in found
            if leaf.is_dir()
        }

    def jails(self) -> list[str]:
        return WarmJails(self.settings.jail_base).list_ids()

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self.pool.close()


@pytest_asyncio.fixture(name="pooled")
async def pool_of_one(rig: VmmRig) -> AsyncIterator[Pooled]:
    pooled = Pooled(rig)
    pooled.start()
    await pooled.until(ready=1)
    yield pooled
    await pooled.stop()
    assert (pooled.leaves(), pooled.jails()) == ({}, [])


def warm_pid(pooled: Pooled) -> int:
    ((pid,),) = pooled.leaves().values()
    return pid


async def launched(store: StoreRig, spec: LaunchSpec) -> VmmIdentity:
    identity = await store.rig.vmms.find(spec.jail_id)
    assert identity is not None
    await store.rig.vmms.check_confinement(identity, spec)
    return identity


async def test_a_guest_boots_in_the_vmm_that_was_launched_ahead(
    pooled: Pooled, store: StoreRig
) -> None:
    pid = warm_pid(pooled)
    pooled.claim(store, 1)

    spec = await store.boot(1, pooled.pool)

    identity = await launched(store, spec)
    assert identity.pid == pid
    assert identity.cgroup == spec.cgroup
    assert +pooled.pool.totals == {"used": 1}
    assert await store.jails.read_log(REF, 1) != b""


async def test_a_sleeper_wakes_in_it_with_its_drives_and_sleeps_again(
    pooled: Pooled, store: StoreRig
) -> None:
    await store.sleep(await store.boot(1))
    pid = warm_pid(pooled)
    pooled.claim(store, 2)

    spec = await store.launch(2, pooled.pool)
    vmm = store.rig.vmms.api(spec.jail_id)
    info = await store.snapshots.verify(REF, 1)
    await vmm.load_snapshot(*await store.snapshots.link(spec.jail_id, spec.uid, info))
    await vmm.resume()
    await vmm.close()

    assert (await launched(store, spec)).pid == pid
    assert (await store.rig.agents.wake(spec.jail_id, PORT, timeout_s=10)).success
    await store.rig.agents.ping(spec.jail_id, PORT, timeout_s=10)
    await store.snapshots.delete_all(REF)
    await store.sleep(spec)


async def test_one_that_was_used_is_replaced_by_another_and_never_used_again(
    pooled: Pooled, store: StoreRig
) -> None:
    used = warm_pid(pooled)
    pooled.claim(store, 1)
    spec = await store.boot(1, pooled.pool)

    await store.rig.vmms.remove(spec.jail_id)
    await pooled.until(ready=1)

    assert warm_pid(pooled) != used


async def test_it_is_refilled_after_a_launch_and_not_beside_it(
    pooled: Pooled, store: StoreRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.host.vmm.warm_pool.PATIENCE_S", 60.0)

    async with pooled.pool.launch():
        pooled.claim(store, 1)
        await store.boot(1, pooled.pool)
        assert pooled.pool.counts() == {"ready": 0, "starting": 0}
        assert len(pooled.leaves()) == 1  # that of the one that was used, which can wait

    await pooled.until(ready=1)


async def test_it_is_refilled_beside_a_guest_that_takes_long_to_boot(
    pooled: Pooled, store: StoreRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.host.vmm.warm_pool.PATIENCE_S", 0.1)

    async with pooled.pool.launch():
        pooled.claim(store, 1)
        await store.boot(1, pooled.pool)
        await pooled.until(ready=1)


async def test_it_is_not_refilled_beside_a_burst_of_launches(
    pooled: Pooled, store: StoreRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All claims are made at its beginning; its launches end one by one."""
    monkeypatch.setattr("handlers.host.vmm.warm_pool.PATIENCE_S", 2.0)

    async with pooled.pool.launch():
        pooled.claim(store, 1)
        await store.boot(1, pooled.pool)
        for _ in range(2):
            async with pooled.pool.launch():
                await asyncio.sleep(1.4)
            assert pooled.pool.counts() == {"ready": 0, "starting": 0}
            assert len(pooled.leaves()) == 1

    await pooled.until(ready=1)


async def test_it_is_refilled_beside_launches_on_cores_that_they_leave(
    rig: VmmRig, store: StoreRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.host.vmm.warm_pool.PATIENCE_S", 60.0)
    pooled = Pooled(rig, cores=4)
    pooled.start()
    try:
        await pooled.until(ready=1)
        async with pooled.pool.launch():
            async with pooled.pool.launch():
                pooled.claim(store, 1)
                await store.boot(1, pooled.pool)
                assert pooled.pool.counts() == {"ready": 0, "starting": 0}
            await pooled.until(ready=1)
    finally:
        await pooled.stop()


async def test_a_claim_that_is_given_back_is_killed(pooled: Pooled) -> None:
    pid = warm_pid(pooled)
    pooled.pool.claim(naming.jail_id(REF, 1), VERSION)
    pooled.pool.give_back(naming.jail_id(REF, 1))

    await pooled.until(ready=1, discarded=1)

    assert warm_pid(pooled) != pid


async def test_one_that_dies_is_noticed_and_replaced(pooled: Pooled) -> None:
    pid = warm_pid(pooled)
    os.kill(pid, signal.SIGKILL)

    await pooled.until(ready=1, died=1)

    assert warm_pid(pooled) != pid


async def test_the_jailer_runs_if_the_claimed_one_is_dead(pooled: Pooled, store: StoreRig) -> None:
    pid = warm_pid(pooled)
    pooled.claim(store, 1)
    os.kill(pid, signal.SIGKILL)

    spec = await store.boot(1, pooled.pool)

    assert (await launched(store, spec)).pid != pid
    assert pooled.pool.totals["failed"] == 1


async def test_the_jailer_runs_if_the_jail_is_not_as_it_was_made(
    pooled: Pooled, store: StoreRig
) -> None:
    pid = warm_pid(pooled)
    (warm,) = pooled.jails()
    os.unlink(f"{pooled.settings.jail_base}/firecracker/{warm}/root/log")
    pooled.claim(store, 1)

    spec = await store.boot(1, pooled.pool)

    assert (await launched(store, spec)).pid != pid


async def test_a_changed_binary_flushes_the_pool(rig: VmmRig) -> None:
    copy = rig.directory / "bin" / "firecracker"
    copy.parent.mkdir()
    shutil.copy(rig.settings.vmm.firecracker, copy)
    vmm = msgspec.structs.replace(rig.settings.vmm, firecracker=str(copy))
    rig.settings = msgspec.structs.replace(rig.settings, vmm=vmm)
    pooled = Pooled(rig)
    pooled.start()
    await pooled.until(ready=1)
    pid = warm_pid(pooled)

    replaced = copy.with_suffix(".new")
    shutil.copy(copy, replaced)
    replaced.rename(copy)

    assert await pooled.binaries.version_for(None) == VERSION  # as each Start asks
    assert pooled.pool.claim(naming.jail_id(REF, 1), VERSION) is None
    await pooled.until(ready=1, discarded=1)
    assert warm_pid(pooled) != pid
    await pooled.stop()


async def test_a_pool_makes_room_for_an_admitted_launch(rig: VmmRig) -> None:
    pooled = Pooled(rig, size=2)
    pooled.start()
    await pooled.until(ready=2)
    pooled.free_mib = 64

    pooled.pool.fit(64)

    await pooled.until(ready=1, discarded=1)
    await pooled.stop()
    assert (pooled.leaves(), pooled.jails()) == ({}, [])


async def test_the_next_worker_removes_what_a_killed_one_left(rig: VmmRig) -> None:
    left = await WarmVmms(rig.settings).launch("warm-0123456789ab", SLOT)
    os.close(left.pidfd)
    pooled = Pooled(rig)
    assert pooled.leaves() == {left.warm_id: [left.identity.pid]}

    await pooled.pool.clear_leftovers()

    assert (pooled.leaves(), pooled.jails()) == ({}, [])
    assert not await rig.vmms.alive(left.identity)


async def test_a_foreign_process_among_the_leftovers_is_not_killed(rig: VmmRig) -> None:
    left = await WarmVmms(rig.settings).launch("warm-0123456789ab", SLOT)
    os.close(left.pidfd)
    pooled = Pooled(rig)
    other = await asyncio.create_subprocess_exec("sleep", "60")
    leaf = rig.tree.path(f"{rig.tree.base}/{naming.WARM_CGROUP}/{left.warm_id}")
    Path(leaf, "cgroup.procs").write_text(str(other.pid))

    await pooled.pool.clear_leftovers()

    assert other.returncode is None
    other.kill()
    await other.wait()
    await pooled.pool.clear_leftovers()
    await pooled.stop()
    assert (pooled.leaves(), pooled.jails()) == ({}, [])


@pytest.mark.parametrize("moved", [False, True])
async def test_it_is_killed_if_the_launch_fails_before_or_after_its_move(
    pooled: Pooled, store: StoreRig, moved: bool
) -> None:
    pid = warm_pid(pooled)
    pooled.claim(store, 1)
    jail_id = naming.jail_id(REF, 1)
    await store.rig.cgroups.ensure(CgroupSpec("acme", jail_id, 256 * MIB, 100_000, 64))
    spec = LaunchSpec(jail_id, store.uid, store.rig.tree.name("acme", jail_id))
    store.rig.launches.append(spec)

    async def launch() -> None:
        async with pooled.pool.used_by(spec) as claimed:
            assert claimed is not None
            if moved:
                await claimed.enter()
                assert store.rig.tree.pids(spec.cgroup) == [pid]
            raise Invalid("the snapshot is not its own")

    with pytest.raises(Invalid):
        await launch()

    assert store.rig.tree.pids(spec.cgroup) == []
    assert not os.path.exists(f"/proc/{pid}/exe")
    assert pooled.pool.totals["discarded"] == 1
    await pooled.until(ready=1)


async def test_it_is_removed_later_if_it_does_not_end_at_once(
    pooled: Pooled, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = pooled.pool.claim(naming.jail_id(REF, 1), VERSION)
    spec = LaunchSpec(naming.jail_id(REF, 1), UID, "unused")

    async def end(_: WarmVmms, __: object) -> None:
        raise Unavailable("it did not exit after SIGKILL")

    async def launch() -> None:
        async with pooled.pool.used_by(spec):
            raise Invalid("the snapshot is not its own")

    monkeypatch.setattr(WarmVmms, "end", end)
    with pytest.raises(Unavailable):
        await launch()
    await pooled.until(ready=1, discarded=1)

    async with asyncio.timeout(20):
        while slot in pooled.pool.slots:
            await asyncio.sleep(0.005)


def refuse_removals(
    monkeypatch: pytest.MonkeyPatch, is_uid_taken: Callable[[], bool]
) -> Iterator[Exception]:
    """The first two removals fail, at which the uid must be taken. Returns those still to come."""
    monkeypatch.setattr("handlers.host.vmm.warm_pool.REMOVE_AGAIN_S", 0.01)
    remove = WarmVmms.remove
    refusals = iter([HostFault("busy"), OSError(16, "busy")])

    async def sometimes(self: WarmVmms, warm_id: str) -> None:
        for refusal in refusals:
            assert is_uid_taken()
            raise refusal
        await remove(self, warm_id)

    monkeypatch.setattr(WarmVmms, "remove", sometimes)
    return refusals


async def test_one_that_cannot_be_removed_keeps_its_uid_until_it_can(
    pooled: Pooled, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = pooled.pool.claim(naming.jail_id(REF, 1), VERSION)
    refusals = refuse_removals(monkeypatch, lambda: slot in pooled.pool.slots)

    pooled.pool.give_back(naming.jail_id(REF, 1))

    async with asyncio.timeout(20):
        while slot in pooled.pool.slots:
            await asyncio.sleep(0.005)
    assert [*refusals] == []


@pytest.mark.parametrize("name", ["firecracker", "jailer"])
async def test_a_launch_ahead_that_fails_leaves_nothing_and_waits(rig: VmmRig, name: str) -> None:
    vmm = msgspec.structs.replace(rig.settings.vmm, **{name: "/nowhere/firecracker"})
    rig.settings = msgspec.structs.replace(rig.settings, vmm=vmm)
    pooled = Pooled(rig)
    pooled.start()

    await pooled.until(failed=1)

    await pooled.stop()
    assert (pooled.leaves(), pooled.jails(), [*pooled.pool.slots]) == ({}, [], [])


async def test_what_a_failed_launch_ahead_leaves_is_removed_in_the_end(
    rig: VmmRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = Pooled(rig)
    refusals = refuse_removals(monkeypatch, lambda: bool(pooled.pool.slots))

    def unproven(warm_id: str, identity: VmmIdentity) -> int:
        raise Unavailable(f"{warm_id} {identity.pid} is not what was launched")

    monkeypatch.setattr("handlers.host.vmm.warm_vmms._open", unproven)
    pooled.start()
    await pooled.until(failed=1)

    async with asyncio.timeout(20):
        while pooled.pool.slots:
            await asyncio.sleep(0.005)

    assert [*refusals] == []
    assert (pooled.leaves(), pooled.jails()) == ({}, [])
    await pooled.stop()
