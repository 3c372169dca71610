"""The fleet, or a cell without workers, the served page and a browser, one of each per module."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.broker.server import connection_to
from tests.page.browser import Browser, browser, served
from tests.page.fleet import Cell, PageFleet, cell, page_fleet
from worker.bus.connection import Connection


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PageFleet]:
    async with page_fleet(tmp_path_factory.mktemp("nats")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium(fleet: PageFleet) -> AsyncIterator[Browser]:
    """In the namespace of the fleet: the page and the nats-server are on its loopback."""
    async with _browser() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cell]:
    """A cell without workers: the test writes what hosts do, with their credentials."""
    async with cell(tmp_path_factory.mktemp("nats")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(bus: Cell) -> AsyncIterator[Browser]:
    """In the namespace of the cell."""
    async with _browser() as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def host(bus: Cell) -> AsyncIterator[Connection]:
    """Signed in as the host h3, whose keys are its own to write."""
    async with connection_to(bus.url("host-h3"), inbox="_INBOX_HOSTD.h3") as connection:
        yield connection


@contextlib.asynccontextmanager
async def _browser() -> AsyncGenerator[Browser]:
    async with contextlib.AsyncExitStack() as stack:
        url = stack.enter_context(served(Path("build/dashboard")))
        yield await stack.enter_async_context(browser(url))
