"""The Grafana dashboard is what Grafana loads as it is, and reads nothing that hostd does not tell.

Its queries are run against a real Prometheus in tests/vm/scraped.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

from tests.unit.test_metrics import CONTRACT

DEPLOY: Final = Path(__file__).parents[3] / "deploy"
DASHBOARD: Final[dict[str, Any]] = json.loads((DEPLOY / "grafana/hostd.json").read_text())
PANELS: Final[list[dict[str, Any]]] = [
    panel for panel in DASHBOARD["panels"] if panel["type"] != "row"
]
SCHEMA: Final = 38  # of Grafana 10; later ones read it
UNITS: Final = {"none", "s", "bytes", "ops", "percentunit"}
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}


def recorded() -> dict[str, str]:
    """The recorded series and their expressions."""
    text = (DEPLOY / "prometheus/hostd.recording.yml").read_text()
    rules = re.findall(r"- record: (\S+)\n +expr: ([^\n]+(?:\n {10,}[^\n]+)*)", text)
    assert len(rules) == text.count("record:")
    return dict(rules)


def test_grafana_10_knows_its_schema() -> None:
    assert DASHBOARD["schemaVersion"] == SCHEMA
    assert re.fullmatch(r"[a-z0-9-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"]
    assert "id" not in DASHBOARD  # Grafana gives one


def test_ids_titles_and_places_are_unique() -> None:
    everything = DASHBOARD["panels"]
    for key in ("id", "title"):
        counts = Counter(panel[key] for panel in everything)
        assert [each for each, count in counts.items() if count > 1] == []
    cells = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in everything)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_a_panel_says_what_it_shows_in_which_unit_from_the_chosen_source(
    panel: dict[str, Any],
) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["datasource"] == DATASOURCE
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert target["datasource"] == DATASOURCE
        assert target["legendFormat"]
        assert 'instance=~"$host"' in target["expr"]


def test_its_variables_are_the_source_and_the_host() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}

    assert variables.keys() == {"datasource", "host"}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    assert variables["host"]["query"]["query"] == "label_values(hostd_build_info, instance)"


def test_it_reads_exported_metrics_and_recorded_series_only() -> None:
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    queries += recorded().values()
    read = {name for query in queries for name in re.findall(r"\bhostd[_:][\w:]+", query)}

    exported = {re.sub(r"_(total|bucket)$", "", name) for name in read if ":" not in name}
    assert exported <= CONTRACT.keys()
    assert {name for name in read if ":" in name} <= recorded().keys()


def test_each_recorded_series_is_read_and_tested() -> None:
    cases = (DEPLOY / "prometheus/hostd.recording.test.yml").read_text()
    queries = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])

    for name in recorded():
        assert name in queries, name
        assert f"expr: {name}" in cases, name


def test_the_provisioned_files_are_of_the_types_that_the_dashboard_needs() -> None:
    source = (DEPLOY / "grafana/datasource.yml").read_text()
    provider = (DEPLOY / "grafana/dashboards.yml").read_text()

    assert re.findall(r"^    type: (\w+)$", source, re.MULTILINE) == [DATASOURCE["type"]]
    assert re.findall(r"^    type: (\w+)$", provider, re.MULTILINE) == ["file"]
