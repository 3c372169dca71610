"""docs/fleet-walkthrough.md: three hosts on one machine, by copying commands."""

from contextlib import AsyncExitStack
from pathlib import Path

from playwright.async_api import Page, expect

from tests.console import steps
from tests.guests.cache import REPOSITORY
from tests.page.browser import browser
from tests.vm.documents.copying import begin, copy
from tests.vm.documents.sandbox import sandbox

PAGE = REPOSITORY / "docs" / "fleet-walkthrough.md"
URL = "http://127.0.0.1:8080/"
BY = "test_the_fleet_walkthrough_works_by_copying"
# What the page shows after a block that begins like this: view, text of a row, what else is in it.
SHOWN = {
    "for n in 1 2 3; do\n    on h$n hostd seed": ("Instances", "acme/web/i-3", "running"),
    "work h2": ("Instances", "acme/web/i-2", "running"),
    "on h1 hostd drain": ("Instances", "acme/web/i-1", "sleeping"),
    "on h1 hostd undrain": ("Instances", "acme/web/i-1", "running"),
}


async def test_the_fleet_walkthrough_works_by_copying(tmp_path: Path) -> None:
    page: Page | None = None
    watched: set[str] = set()
    async with AsyncExitStack() as stack:
        shell = await stack.enter_async_context(sandbox(tmp_path))
        await begin(shell)
        for step in steps(PAGE, BY):
            await copy(step, shell)
            if page is None and "PAGE=$!" in step.block.text:
                chromium = await stack.enter_async_context(browser(URL))
                page = await stack.enter_async_context(chromium.page())
                await expect(page.locator("#link")).to_have_text("Live")
                for host in ("h1", "h2", "h3"):
                    await _row(page, "Hosts", host, "ready")
            for beginning, shown in SHOWN.items():
                if step.block.text.startswith(beginning):
                    assert page is not None
                    await _row(page, *shown)
                    watched.add(beginning)
        left = await shell.type("ls /var/tmp; find /sys/fs/cgroup -name 'hostd*'; ip -br link")
        processes = await shell.type("ps -e -o comm=")

    assert watched == set(SHOWN)
    assert left[1].split()[0] == "lo"
    assert set(processes[1].split()) <= {"bash", "ps"}


async def _row(page: Page, view: str, name: str, holds: str) -> None:
    """Wait until the row of a name in a table holds a text."""
    await page.get_by_role("link", name=view, exact=True).click()
    table = page.get_by_role("table", name=view)
    row = table.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))
    await expect(row).to_contain_text(holds)
