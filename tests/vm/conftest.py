"""The rig as a fixture, in a network namespace of its own with the instance's TAP."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.vm.rig import TAP, UID, Rig, add_tap, own_network, rig


@pytest_asyncio.fixture(name="rig")
async def rig_in_its_namespace(tmp_path: Path) -> AsyncIterator[Rig]:
    with own_network():
        add_tap(TAP, UID)
        async with rig(tmp_path) as made:
            yield made
