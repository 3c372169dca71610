"""Each alert has its runbook, and each runbook of an alert its alert; what a page names exists."""

import re
from pathlib import Path

import pytest

from tests.console import blocks, commands
from tests.unit.test_metrics import CONTRACT as METRICS
from tests.vm.runbooks.faults import FAULTS

ROOT = Path(__file__).parents[3]
PAGES = ROOT / "docs" / "runbooks"
RULES = (ROOT / "deploy/prometheus/hostd.rules.yml").read_text(encoding="utf-8")
HEADINGS = ["What it means", "What users see", "Look", "Get out", "It is over when"]
RUNBOOKS = sorted(path for path in PAGES.glob("*.md") if path.name != "README.md")
NAMES = [path.stem for path in RUNBOOKS]


def alerts() -> dict[str, str]:
    """Each alert with the text of its rule."""
    _, *rules = re.split(r"^ +- alert: ", RULES, flags=re.MULTILINE)
    return {rule.split("\n")[0]: rule for rule in rules}


def test_each_alert_has_one_page_and_links_to_it() -> None:
    linked = {
        alert: re.findall(r"^ +runbook_url: (.*)$", rule, re.MULTILINE)
        for alert, rule in alerts().items()
    }
    assert linked

    assert linked == {alert: [f"docs/runbooks/{alert}.md"] for alert in linked}
    assert sorted(linked) == [name for name in NAMES if name.startswith("Hostd")]


def test_each_page_is_executed_on_a_host_in_its_state() -> None:
    assert sorted(FAULTS) == NAMES


def test_the_list_of_pages_is_complete() -> None:
    text = (PAGES / "README.md").read_text(encoding="utf-8")

    assert sorted(re.findall(r"^\| \[[^\]]*\]\(([\w-]+)\.md\)", text, re.MULTILINE)) == NAMES


@pytest.mark.parametrize("page", RUNBOOKS, ids=NAMES)
def test_a_page_says_what_it_means_who_sees_it_and_when_it_is_over(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    for heading in ("Look", "Get out", "It is over when"):
        section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        assert "```console" in section, heading
    if page.stem.startswith("Hostd"):
        assert text.startswith(f"# {page.stem}\n")


@pytest.mark.parametrize("page", RUNBOOKS, ids=NAMES)
def test_the_metrics_of_a_page_exist(page: Path) -> None:
    named = set(re.findall(r"\bhostd_\w+", page.read_text(encoding="utf-8")))
    known = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in named}

    assert known - set(METRICS) == set()


@pytest.mark.parametrize("page", RUNBOOKS, ids=NAMES)
def test_the_metric_of_an_alert_is_on_its_page(page: Path) -> None:
    rule = alerts().get(page.stem, "")
    expression = re.search(r"^ +expr: (.*)$", rule, re.MULTILINE)
    read: set[str] = set(re.findall(r"\bhostd_\w+", expression[1])) if expression else set()
    text = page.read_text(encoding="utf-8")

    assert {name for name in read if name.removesuffix("_bucket") not in text} == set()


@pytest.mark.parametrize("page", RUNBOOKS, ids=NAMES)
def test_only_commands_that_look_are_repeated_and_all_commands_are_shown_as_typed(
    page: Path,
) -> None:
    verbs = "start|stop|sleep|wake|destroy|adopt|release|drain|undrain"
    changing = re.compile(rf"hostd ({verbs})\b|(rm|kill|systemctl|sed -i) ")
    repeated = [each.text for each in commands(page) if each.repeated]

    assert [text for text in repeated if changing.match(text)] == []
    assert {block.language for block in blocks(page)} == {"console"}
