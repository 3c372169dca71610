"""One live host for all tests of a module: what they leave on it is what they are about.

The `pytestmark` of a module that uses it is `pytest.mark.asyncio(loop_scope="module")`.
"""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.live_host import LiveHost, live_host


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[LiveHost]:
    """A worker without any network or instance yet."""
    async with live_host() as made:
        yield made
