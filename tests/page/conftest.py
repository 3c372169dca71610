"""The fleet, the served page and a browser, one of each for all tests of a module."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.page.browser import Browser, browser, served
from tests.page.fleet import PageFleet, page_fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PageFleet]:
    async with page_fleet(tmp_path_factory.mktemp("nats")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium(fleet: PageFleet) -> AsyncIterator[Browser]:
    """In the namespace of the fleet: the page and the nats-server are on its loopback."""
    async with contextlib.AsyncExitStack() as stack:
        url = stack.enter_context(served(Path("build/dashboard")))
        yield await stack.enter_async_context(browser(url))
