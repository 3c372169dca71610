"""docs/dashboard.md, "Deploying it": the page is served and connects as it says."""

import json
import shutil
from pathlib import Path

from playwright.async_api import expect

from tests.console import steps
from tests.guests.cache import BUILD, REPOSITORY
from tests.page.browser import browser, sign_in
from tests.page.fleet import DOMAIN, cell
from tests.shell import shell

PAGE = REPOSITORY / "docs" / "dashboard.md"
URL = "http://127.0.0.1:8080/"


async def test_the_page_is_served_and_connects_as_its_document_says(tmp_path: Path) -> None:
    (step,) = steps(PAGE, "test_the_page_is_served_and_connects_as_its_document_says")
    files = tmp_path / "build" / "dashboard"
    shutil.copytree(BUILD / "dashboard", files)
    async with cell(tmp_path / "nats") as made:
        (files / "config.json").write_text(
            json.dumps({"url": made.server.web_url, "cell": "default", "jsDomain": DOMAIN})
        )
        async with shell({"PATH": "/usr/bin:/bin"}, directory=str(tmp_path)) as serving:
            code, _ = await serving.type(f"{step.block.text.strip()} > log 2>&1 &")
            assert code == 0
            await serving.type(f"curl -s --retry 20 --retry-all-errors {URL} > /dev/null")
            async with browser(URL) as chromium, chromium.page() as page:
                filled = page.get_by_label("WebSocket URL of NATS")
                await expect(filled).to_have_value(made.server.web_url)
                await sign_in(page, made.server.web_url, "dashboard", "dashboard", DOMAIN)
                await expect(page.get_by_role("table", name="Hosts")).to_be_visible()
            await serving.type("kill %1; wait")
