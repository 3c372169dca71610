"""What handlers rely on of artifacts, disks, jails and snapshots, whoever implements them.

Each test runs against every store in `STORES`: the real mechanisms on real files, and the
in-memory host that the handlers' tests stand on, so that it cannot promise what is not so.
"""

import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from handlers.errors import HostFault, Invalid
from handlers.host.jail import jails
from handlers.host.snapshot import snapshots
from handlers.host.storage import artifacts, data_disks
from handlers.interfaces import DataDisks, Jails, Snapshots
from handlers.mechanism import Mechanism
from handlers.specs import (
    Artifact,
    ArtifactSpec,
    DataDiskSpec,
    JailSpec,
    SnapshotFacts,
    SnapshotInfo,
)
from schemas import naming
from tests.fakes import host as fake
from tests.kernel.storage.store_host import REF, REVISION, make_world

UID = 2_000_000_007
VMM = "1.12.1"
REVISION_SPEC = ArtifactSpec(REF.tenant_id, REF.pool_id, REVISION)
DISK_SPEC = DataDiskSpec(REF, 8, None)


@dataclass(frozen=True)
class Store:
    """The four mechanisms, and how a paused VMM writes its snapshot into the jail."""

    artifacts: Mechanism[ArtifactSpec, Artifact]
    data_disks: DataDisks
    jails: Jails
    snapshots: Snapshots
    vmm_writes: Callable[[str, tuple[str, str]], Awaitable[None]]


@asynccontextmanager
async def real_store(directory: Path) -> AsyncGenerator[Store]:
    world = make_world(directory)
    data, state = str(world.data), str(world.state)
    base = str(world.jails)
    real_jails = jails.Jails(data=data, state=state, jail_base=base)
    real_snapshots = snapshots.Snapshots(
        data=data, state=state, jail_base=base, cpu_model="test", kernel_release="test"
    )

    async def vmm_writes(jail_id: str, paths: tuple[str, str]) -> None:
        for path, size in zip(paths, (17_000, 1 << 20), strict=True):
            file = world.jails / "firecracker" / jail_id / "root" / path.lstrip("/")
            file.write_bytes(os.urandom(size))
            os.chown(file, UID, UID)

    yield Store(
        artifacts=artifacts.Artifacts(data=data, state=state),
        data_disks=data_disks.DataDisks(data=data, jail_base=base),
        jails=real_jails,
        snapshots=real_snapshots,
        vmm_writes=vmm_writes,
    )
    real_snapshots.close()
    for jail in await real_jails.list_ids():
        await real_jails.remove(jail)


@asynccontextmanager
async def fake_store(_dir: Path) -> AsyncGenerator[Store]:
    machine = fake.seeded()

    async def vmm_writes(jail_id: str, _paths: tuple[str, str]) -> None:
        machine.guests[jail_id] = fake.Guest(state="Paused", counter=1)

    yield Store(
        artifacts=fake.FakeArtifacts(machine),
        data_disks=fake.FakeDataDisks(machine),
        jails=fake.FakeJails(machine),
        snapshots=fake.FakeSnapshots(machine),
        vmm_writes=vmm_writes,
    )


STORES: dict[str, Callable[[Path], AbstractAsyncContextManager[Store]]] = {
    "real": real_store,
    "fake": fake_store,
}


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    async with STORES[request.param](tmp_path) as made:
        yield made


def jail_spec(launch: int) -> JailSpec:
    jail_id = naming.jail_id(REF, launch)
    return JailSpec(ref=REF, jail_id=jail_id, uid=UID, files=(), config=b"{}")


async def test_launches_are_those_with_a_jail(store: Store) -> None:
    assert list(await store.jails.launches(REF)) == []

    for launch in (2, 10):
        await store.jails.ensure(jail_spec(launch))

    assert sorted(await store.jails.launches(REF)) == [2, 10]


async def seal(store: Store, number: int, *, keep_drives: bool = False) -> SnapshotInfo:
    """A jail of that launch, and a snapshot of it that is not published yet."""
    spec = jail_spec(number)
    await store.jails.ensure(spec)
    await store.vmm_writes(spec.jail_id, await store.snapshots.begin_write(spec.jail_id, UID))
    facts = SnapshotFacts(
        ref=REF,
        number=number,
        launch=number,
        revision=REVISION,
        vcpus=2,
        mem_mib=1,
        vmm_version=VMM,
        disk=None,
        data_disk_path=None,
        keep_drives=keep_drives,
    )
    return await store.snapshots.seal(spec.jail_id, facts)


async def sleep(store: Store, number: int) -> SnapshotInfo:
    info = await seal(store, number)
    await store.snapshots.publish(REF, number)
    await store.jails.remove(naming.jail_id(REF, number))
    return info


async def test_a_revision_is_there_until_it_is_removed(store: Store) -> None:
    assert not await store.artifacts.exists(REVISION_SPEC.key)

    first = await store.artifacts.ensure(REVISION_SPEC)
    assert await store.artifacts.exists(REVISION_SPEC.key)
    assert await store.artifacts.ensure(REVISION_SPEC) == first

    await store.artifacts.remove(REVISION_SPEC.key)
    await store.artifacts.remove(REVISION_SPEC.key)
    assert not await store.artifacts.exists(REVISION_SPEC.key)


async def test_a_disk_is_found_again_by_its_identity(store: Store) -> None:
    assert not await store.data_disks.exists(DISK_SPEC.key)

    disk = await store.data_disks.ensure(DISK_SPEC)

    known = replace(DISK_SPEC, known=disk.identity)
    assert await store.data_disks.exists(DISK_SPEC.key)
    assert await store.data_disks.ensure(known) == disk
    other = msgspec.structs.replace(disk.identity, ino=disk.identity.ino + 1)
    with pytest.raises(Invalid):
        await store.data_disks.ensure(replace(DISK_SPEC, known=other))


async def test_a_removed_disk_is_gone_and_absent_is_success(store: Store) -> None:
    await store.data_disks.ensure(DISK_SPEC)

    for _ in range(2):
        await store.data_disks.remove(DISK_SPEC.key)
        assert not await store.data_disks.exists(DISK_SPEC.key)


async def test_a_recorded_disk_that_is_missing_is_not_wiped(store: Store) -> None:
    disk = await store.data_disks.ensure(DISK_SPEC)
    for _ in range(2):
        await store.data_disks.check_wipe(REF, disk.identity)
        await store.data_disks.wipe(REF, disk.identity)
    await store.data_disks.remove(DISK_SPEC.key)

    with pytest.raises(Invalid, match="is missing"):
        await store.data_disks.check_wipe(REF, disk.identity)
    with pytest.raises(HostFault, match="not wiped"):
        await store.data_disks.wipe(REF, disk.identity)
    await store.data_disks.check_wipe(REF, None)
    await store.data_disks.wipe(REF, None)


@pytest.mark.parametrize("secrets", [None, b"{}"])
async def test_a_jail_is_there_until_it_is_removed(store: Store, secrets: bytes | None) -> None:
    spec = replace(jail_spec(1), secrets=secrets)
    assert not await store.jails.exists(spec.key)

    jail = await store.jails.ensure(spec)
    assert (jail.has_config, jail.has_secrets) == (True, secrets is not None)
    assert jail.root.endswith(f"/{spec.jail_id}/root")
    assert await store.jails.exists(spec.key)
    assert await store.jails.ensure(spec) == jail

    await store.jails.remove(spec.key)
    await store.jails.remove(spec.key)
    assert not await store.jails.exists(spec.key)


async def test_a_snapshot_is_nothing_before_it_is_published(store: Store) -> None:
    info = await seal(store, 1)

    assert await store.snapshots.read(REF) is None
    with pytest.raises(HostFault):
        await store.snapshots.verify(REF, 1)

    await store.snapshots.publish(REF, 1)
    assert await store.snapshots.read(REF) == info
    assert await store.snapshots.verify(REF, 1) == info


async def test_a_publication_repeated_is_success(store: Store) -> None:
    await sleep(store, 1)

    await store.snapshots.publish(REF, 1)

    assert await store.snapshots.read(REF) is not None


async def test_the_newest_published_snapshot_is_read(store: Store) -> None:
    await sleep(store, 1)
    newer = await sleep(store, 2)
    await seal(store, 3)

    assert await store.snapshots.read(REF) == newer


async def test_a_discard_spares_what_is_not_below(store: Store) -> None:
    await sleep(store, 1)
    newer = await sleep(store, 2)

    await store.snapshots.discard(REF, below=2)
    assert await store.snapshots.read(REF) == newer
    with pytest.raises(HostFault):
        await store.snapshots.verify(REF, 1)

    await store.snapshots.delete_all(REF)
    await store.snapshots.delete_all(REF)
    assert await store.snapshots.read(REF) is None


async def test_a_failed_wake_leaves_the_snapshot_as_it_was(store: Store) -> None:
    info = await sleep(store, 1)
    await store.jails.ensure(jail_spec(2))
    assert await store.snapshots.verify(REF, 1) == info

    assert len(set(await store.snapshots.link(jail_spec(2).jail_id, UID, info))) == 2
    await store.jails.remove(jail_spec(2).jail_id)
    await store.snapshots.restore_ownership(REF, 1)

    assert await store.snapshots.verify(REF, 1) == info


async def test_the_memory_is_hashed_while_it_is_there(store: Store) -> None:
    await sleep(store, 1)

    assert not await store.snapshots.is_hashed(REF, 1)
    digest = await store.snapshots.hash_memory(REF, 1)
    assert digest is not None
    assert len(digest) == 64
    assert await store.snapshots.is_hashed(REF, 1)
    assert await store.snapshots.hash_memory(REF, 1) == digest

    await store.snapshots.delete_all(REF)
    assert await store.snapshots.hash_memory(REF, 1) is None
    assert await store.snapshots.is_hashed(REF, 1)


async def test_settling_what_is_gone_is_success(store: Store) -> None:
    await store.snapshots.restore_ownership(REF, 1)


async def test_a_consumed_snapshot_is_woken_by_nobody_again(store: Store) -> None:
    info = await sleep(store, 1)
    await store.jails.ensure(jail_spec(2))
    await store.snapshots.link(jail_spec(2).jail_id, UID, info)

    for _twice in range(2):
        await store.snapshots.mark_consumed(REF, 1)

        assert await store.snapshots.read(REF) is None
        with pytest.raises(HostFault):
            await store.snapshots.verify(REF, 1)
        assert await store.snapshots.hash_memory(REF, 1) is None
    await store.snapshots.restore_ownership(REF, 1)
    await store.snapshots.delete_all(REF)
    await store.snapshots.mark_consumed(REF, 1)


@pytest.mark.parametrize("published", [False, True])
async def test_a_dropped_snapshot_is_gone_and_the_others_stay(
    store: Store, published: bool
) -> None:
    older = await sleep(store, 1)
    await (sleep(store, 2) if published else seal(store, 2))

    for _twice in range(2):
        await store.snapshots.delete(REF, 2)

        assert await store.snapshots.read(REF) == older
        with pytest.raises(HostFault):
            await store.snapshots.verify(REF, 2)
    assert await store.snapshots.verify(REF, 1) == older


async def test_a_snapshot_that_was_dropped_can_be_taken_again(store: Store) -> None:
    await seal(store, 1)
    await store.snapshots.delete(REF, 1)

    info = await sleep(store, 1)

    assert await store.snapshots.read(REF) == info


async def test_images_are_kept_only_if_asked_for(store: Store) -> None:
    kept = await seal(store, 1, keep_drives=True)
    await store.snapshots.publish(REF, 1)
    plain = await seal(store, 2)

    assert kept.kept_config is not None
    assert kept.kept_secrets is None, "the jail had none"
    assert (plain.kept_config, plain.kept_secrets) == (None, None)
