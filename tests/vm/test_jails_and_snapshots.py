"""Jails, drives and snapshots made by hostd's mechanisms, used by the real VMM."""

import os
import stat
from pathlib import Path

import pytest

from handlers.errors import HostFault
from handlers.host.snapshot.manifest import numbers_of
from tests.kernel.storage.store_host import REF
from tests.vm.store_rig import PORT, StoreRig
from tests.vm.vmm_rig import UID


async def test_a_guest_sleeps_and_wakes_from_files_its_vmm_can_only_read(store: StoreRig) -> None:
    first = await store.boot(1)
    await store.sleep(first)
    disk = os.stat(store.disk.path)
    assert (disk.st_uid, stat.S_IMODE(disk.st_mode), disk.st_nlink) == (0, 0o600, 1)

    second = await store.launch(2)
    vmm = store.rig.vmms.api(second.jail_id)
    info = await store.snapshots.verify(REF, 1)
    paths = await store.snapshots.link(second.jail_id, UID, info)
    await vmm.load_snapshot(*paths)
    await vmm.resume()
    await vmm.close()
    await store.snapshots.delete_all(REF)

    ack = await store.rig.agents.wake(second.jail_id, PORT, timeout_s=10)
    assert ack.success
    await store.rig.agents.ping(second.jail_id, PORT, timeout_s=10)
    assert numbers_of(f"{store.rig.settings.paths.state}/snapshots", REF) == []
    woken = Path(store.rig.settings.jail_base, "firecracker", second.jail_id, "root", "woken")
    assert (woken / "mem").stat().st_uid == 0
    assert b"Artificially kick devices" in await store.jails.read_log(REF, 2)


async def test_a_truncated_memory_file_is_refused_by_hostd_though_the_vmm_accepts_it(
    store: StoreRig,
) -> None:
    await store.sleep(await store.boot(1))
    memory = store.world.top / "snapshots" / str(REF) / "1" / "mem"
    size = memory.stat().st_size
    os.truncate(memory, size // 2)
    os.truncate(memory, size)

    with pytest.raises(HostFault, match="modified before it was hashed"):
        await store.snapshots.verify(REF, 1)
