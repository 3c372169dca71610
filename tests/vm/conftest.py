"""The rigs as fixtures, in a network namespace of its own with the instance's TAP."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.guests.namespace import own_network
from tests.vm.store_rig import StoreRig, open_store
from tests.vm.vmm_rig import TAP, UID, VmmRig, add_tap, vmm_rig


@pytest_asyncio.fixture(name="rig")
async def rig_in_its_namespace(tmp_path: Path) -> AsyncIterator[VmmRig]:
    with own_network():
        add_tap(TAP, UID)
        async with vmm_rig(tmp_path) as made:
            yield made


@pytest_asyncio.fixture(name="store")
async def store_of_the_rig(rig: VmmRig) -> AsyncIterator[StoreRig]:
    async with open_store(rig) as made:
        yield made
