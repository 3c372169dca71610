"""Each command that a page shows is executed by a test, or the page's source says why not.

`python -m tests.console README.md docs/*.md` lists both.
"""

import re
from pathlib import Path

import pytest

from tests.console import Block, blocks, steps

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "deploy/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
CODE = [block for page in PAGES for block in blocks(page) if block.is_code]
# What no test can or should do. Whatever else is written as a reason can be executed.
REASONS = {
    "each line is a test run of its own, minutes to hours long",
    "npm's registry, which `make setup` asks for the same",
}


def place(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


def test_pages_are_found() -> None:
    assert {"README.md", "docs/operations.md"} <= {str(page.relative_to(ROOT)) for page in PAGES}
    assert len(CODE) > 20


@pytest.mark.parametrize("block", CODE, ids=place)
def test_a_block_is_executed_by_a_test_or_says_why_not(block: Block) -> None:
    assert bool(block.by) != bool(block.reason), "name its test, or the reason, in a comment"

    assert block.reason in REASONS | {""}, "this can be executed, or the list lacks a reason"


def test_no_reason_is_left_over() -> None:
    assert {block.reason for block in CODE} - {""} == REASONS


@pytest.mark.parametrize("block", [block for block in CODE if block.by == "CI"], ids=place)
def test_what_ci_executes_are_its_own_commands(block: Block) -> None:
    files = [ROOT / ".ci" / "run", *ROOT.glob(".github/workflows/*.yml")]
    executed = "\n".join(path.read_text(encoding="utf-8") for path in files)
    commands = [line.partition("#")[0].strip() for line in block.text.splitlines()]

    for command in commands:
        assert re.search(rf"^ *(- run: )?{re.escape(command)}$", executed, re.MULTILINE), command


@pytest.mark.parametrize("by", sorted({block.by for block in CODE} - {"", "CI"}))
def test_the_named_test_copies_the_blocks_of_its_pages(by: str) -> None:
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")]
    definition = re.compile(rf"^(async )?def {by}\(", re.MULTILINE)
    defined = [source for source in sources if definition.search(source)]
    pages = {block.page for block in CODE if block.by == by}

    assert len(defined) == 1
    assert re.search(r"\b(steps|blocks)\(", defined[0])
    for page in pages:
        assert f'"{page.name}"' in defined[0]
        assert "steps(" not in defined[0] or steps(page, by)
