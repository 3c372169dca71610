"""A headless Chromium that has the page open, and the static files that it opens.

Source: Playwright for Python; Debian's package `chromium`. As root it has no sandbox of its own.
"""

import contextlib
import functools
import http.server
import os
import re
import threading
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.async_api import Browser as Chromium
from playwright.async_api import ConsoleMessage, Page, async_playwright, expect

CHROMIUM = "/usr/bin/chromium"
WAIT_MS = 20_000


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
        """Nothing: requests are not what a test is about."""


@contextlib.contextmanager
def served(directory: Path) -> Generator[str]:
    """Any web server will do: this is Python's. Returns the page's URL."""
    if not (directory / "app.js").exists():
        missing(f"no {directory}: run `make setup`")
    handler = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="page-files")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Browser:
    """Opens pages; `complaints` is all that they wrote to the console as a warning or an error."""

    chromium: Chromium
    url: str
    complaints: list[str] = field(default_factory=list[str])

    @contextlib.asynccontextmanager
    async def page(self, fragment: str = "", **options: object) -> AsyncGenerator[Page]:
        context = await self.chromium.new_context(**options)  # type: ignore[arg-type]
        try:
            page = await context.new_page()
            page.set_default_timeout(WAIT_MS)
            page.on("console", self._note)
            page.on("pageerror", lambda error: self.complaints.append(str(error)))
            await page.goto(self.url + fragment)
            yield page
        finally:
            await context.close()

    def _note(self, message: ConsoleMessage) -> None:
        is_known = "config.json" in message.location.get("url", "")  # optional, see the page
        if message.type in {"warning", "error"} and not is_known:
            self.complaints.append(message.text)


@contextlib.asynccontextmanager
async def browser(url: str) -> AsyncGenerator[Browser]:
    if not os.path.exists(CHROMIUM):
        missing(f"no {CHROMIUM}")
    expect.set_options(timeout=WAIT_MS)
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield Browser(chromium, url)
        finally:
            await chromium.close()


def missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


async def sign_in(page: Page, url: str, user: str, password: str, domain: str) -> None:
    """Fill the form and wait until the state has been read."""
    await page.get_by_label("WebSocket URL of NATS").fill(url)
    await page.get_by_label("User").fill(user)
    await page.get_by_label("Password").fill(password)
    await page.get_by_text("More", exact=True).click()
    await page.get_by_label(re.compile("JetStream domain")).fill(domain)
    await page.get_by_role("button", name="Connect", exact=True).click()
    await expect(page.locator("#link")).to_have_text("Live")
