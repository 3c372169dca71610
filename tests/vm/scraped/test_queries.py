"""Each query of the dashboard, run by a real Prometheus that scrapes a real worker."""

import asyncio
import json
import os
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from schemas.requests import SleepInstance, StartInstance, WakeInstance
from tests.unit.meters.test_dashboard import PANELS
from tests.vm.scraped.scraped_host import LISTEN, NAMES, scraped_host

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT: Final = Path(__file__).parents[3]
PROMETHEUS: Final = ROOT / "build/tools/prometheus"
RULES: Final = ROOT / "deploy/prometheus"
API: Final = ("127.0.0.1", 9090)
# A query without data on a host that is well, with the reason.
NO_DATA: Final = {
    "Retries": "a code has a series once a command was tried again",
    "Orphans": "a kind has a series once an orphan of it was seen twice, 60 s apart",
    "Rows that cannot be read": "a table has a series while it has such a row",
}


async def ask(path: str, **arguments: str) -> Any:
    """The `data` of Prometheus' answer. Raises OSError while it does not listen."""
    reader, writer = await asyncio.open_connection(*API)
    target = f"/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
    writer.write(f"GET {target} HTTP/1.0\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert head.split()[1] == "200", f"{arguments}: {body}"
    return json.loads(body)["data"]


async def query(text: str) -> list[Any]:
    """As Grafana sends it for all hosts and a short range."""
    whole = text.replace("$__rate_interval", "1m").replace("$host", ".*")
    found: list[Any] = (await ask("query", query=whole))["result"]
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def prometheus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[None]:
    """It scrapes each second a worker that has done what a guest's life needs."""
    if not PROMETHEUS.exists():
        assert not os.environ.get("CI"), f"{PROMETHEUS} is missing: run make setup"
        pytest.skip(f"{PROMETHEUS} is missing: run make setup")
    directory = tmp_path_factory.mktemp("prometheus")
    example = (RULES / "prometheus.yml").read_text()
    assert f'targets: ["{LISTEN}"]' in example
    often = "scrape_interval: 1s\n  evaluation_interval: 1s"
    config = example.replace("scrape_interval: 15s", often)
    for name in ("hostd.rules.yml", "hostd.recording.yml"):
        config = config.replace(f"- {name}", f"- {RULES / name}")
    (directory / "prometheus.yml").write_text(config)
    async with scraped_host() as host:
        process = await asyncio.create_subprocess_exec(
            PROMETHEUS,
            f"--config.file={directory}/prometheus.yml",
            f"--storage.tsdb.path={directory}/data",
            "--web.listen-address=127.0.0.1:9090",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            await until('up{job="hostd"} == 1')
            for request in (SleepInstance(*NAMES, force=False), WakeInstance(*NAMES)):
                assert (await host.run(request))["code"] == "ok"
            absent = StartInstance(NAMES[0], NAMES[1], "none")
            async with asyncio.timeout(60):  # a rate needs two scrapes with a difference
                while not await query("hostd:command_failures:ratio_rate5m > 0"):
                    assert (await host.run(absent))["code"] == "not_found"
                    await asyncio.sleep(0.5)
            yield
        finally:
            process.terminate()
            await process.wait()


async def until(text: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if await query(text):
                    return
            except OSError:
                pass  # it does not listen yet
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
async def test_each_query_of_a_panel_has_data(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        found = await query(target["expr"])

        assert found or panel["title"] in NO_DATA, target["expr"]


async def test_each_reason_is_of_a_panel() -> None:
    assert NO_DATA.keys() <= {panel["title"] for panel in PANELS}


async def test_each_rule_can_be_evaluated() -> None:
    async with asyncio.timeout(60):
        while True:
            groups = (await ask("rules"))["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            if all(rule["health"] != "unknown" for rule in rules):
                break
            await asyncio.sleep(0.2)

    assert {rule["name"]: rule["lastError"] for rule in rules if rule["health"] != "ok"} == {}
    assert {rule["type"] for rule in rules} == {"alerting", "recording"}


async def test_a_host_that_is_well_has_no_alert() -> None:
    assert await query('ALERTS{alertstate="firing"}') == []
