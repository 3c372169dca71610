"""`hostd demo --page`, as `make demo` offers it.

The page shows the demo's instance, from outside of the demo's namespace.
"""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

from playwright.async_api import expect

from tests.guests.cache import BUILD, REPOSITORY
from tests.page.browser import browser


async def test_the_demo_is_watched_in_a_browser_and_leaves_nothing(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from worker.cli.main import main; main()"),
        *(*offered(), "--build", str(BUILD)),
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            url = await address(process)
        async with browser(url) as chromium, chromium.page("#/instances") as page:
            await expect(page.locator("#link")).to_have_text("Live")
            row = page.get_by_role("row").filter(has_text="acme/web/i-1")
            await expect(row).to_contain_text("sleeping")
            await page.get_by_role("link", name="Events").click()
            events = page.get_by_role("table", name="Events")
            for change in ("waking → running", "DestroyInstance ok", "SetupNetwork ok"):
                await expect(events).to_contain_text(change)
            await page.get_by_role("link", name="Hosts").click()
            await expect(page.get_by_role("row").nth(1)).to_contain_text("ready")
            complaints = list(chromium.complaints)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)  # it removes what it made
            try:
                async with asyncio.timeout(60):
                    await process.communicate()
            except TimeoutError:
                process.kill()
                await process.communicate()

    assert complaints == []
    assert process.returncode == 128 + signal.SIGINT, err.decode()
    assert list(tmp_path.iterdir()) == []


def offered() -> list[str]:
    """The arguments of the command that `make demo` offers in the end."""
    (command,) = re.findall(
        r'@echo "To watch it in a browser: \.venv/bin/hostd (.*)"',
        (REPOSITORY / "Makefile").read_text(),
    )
    return str(command).split()


async def address(process: asyncio.subprocess.Process) -> str:
    """The page's, as the demo prints it."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        if found := re.search(rb"http://\S+", line):
            return found[0].decode()
    raise AssertionError("the demo ended")
