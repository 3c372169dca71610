"""Every command, path and page that a text names exists; the map of the tree is complete."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from worker.cli.main import COMMANDS

ROOT = Path(__file__).parents[3]
SOURCES = ("worker", "handlers", "schemas", "tests", "bench", "deploy", "docs", "typings")
CONTRACT = ROOT / "docs" / "contract.md"
NOT_YET = "## Not yet"
GENERATED = {"bench/results.json", "worker/release/commit.txt"}
SUFFIXES = {".py", ".md", ".toml", ".sh", ".service", ".yml", ".conf", ".json"}


def texts() -> list[Path]:
    """Every text file of the repository that a person reads, but not this one."""
    tree = [path for name in SOURCES for path in (ROOT / name).rglob("*")]
    files = [path for path in [*ROOT.glob("*"), *tree] if path.suffix in SUFFIXES]
    return sorted(path for path in files if path.is_file() and path != Path(__file__))


def pages() -> list[Path]:
    return [path for path in texts() if path.suffix == ".md"]


def read(path: Path) -> str:
    """The text of a file; of the contract only what is built."""
    text = path.read_text(encoding="utf-8")
    return text.partition(NOT_YET)[0] if path == CONTRACT else text


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def planned() -> set[str]:
    """The subcommands that the contract lists as not built."""
    section = CONTRACT.read_text(encoding="utf-8").partition(NOT_YET)[2]
    return set(re.findall(r"`hostd ([a-z-]+)`", section))


def hits(pattern: str) -> Iterator[tuple[str, str]]:
    """File and first group of each match in all texts."""
    for path in texts():
        for match in re.finditer(pattern, read(path), re.MULTILINE):
            yield name_of(path), match[1]


def test_every_quoted_subcommand_exists() -> None:
    quoted = set(hits(r"`hostd ([a-z][a-z-]*)")) | set(in_shell_blocks())
    assert {("README.md", "seed"), ("docs/operations.md", "provision")} <= quoted

    assert {each for each in quoted if each[1] not in COMMANDS} == set()


def in_shell_blocks() -> Iterator[tuple[str, str]]:
    """Page and subcommand of each line of a shell block that runs `hostd`."""
    for page in pages():
        for block in re.findall(
            r"^```(?:sh|console)\b[^\n]*\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL
        ):
            typed = re.finditer(r"^(?:# )?(?:\S*/)?hostd ([a-z][a-z-]*)", block, re.MULTILINE)
            for command in (each[1] for each in typed):
                yield name_of(page), command


def test_no_text_refers_to_a_subcommand_that_is_not_built() -> None:
    assert NOT_YET in CONTRACT.read_text(encoding="utf-8")
    assert planned() & set(COMMANDS) == set()

    for word in planned():
        assert list(hits(rf"\bhostd ({word})\b")) == []


def test_the_contract_lists_all_subcommands() -> None:
    (listed,) = re.findall(r"^`hostd (run \|[^`]*)`", read(CONTRACT), re.MULTILINE)

    assert sorted(listed.split(" | ")) == sorted(COMMANDS)


def test_every_quoted_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(hits(r"`make ([a-z]+)`")) | set(hits(r"^make ([a-z]+)"))
    assert ("CONTRIBUTING.md", "unit") in named

    assert {each for each in named if each[1] not in targets} == set()


def test_links_lead_to_a_file_and_a_heading() -> None:
    assert [(name_of(page), target) for page in pages() for target in broken_links(page)] == []


def broken_links(page: Path) -> Iterator[str]:
    """Relative links of a page without a file, or with an anchor that no heading has."""
    prose = re.sub(r"`[^`\n]*`", "code", read(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        if target.startswith("https://"):
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            yield target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Git hosting sites derive them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_paths_in_backticks_exist() -> None:
    tops = "|".join(map(re.escape, [*SOURCES, ".ci", ".github"]))
    named = {
        (file, path)
        for file, name in hits(rf"`((?:{tops})/[^`\s:]*)`")
        for path in expanded(name)
        if path not in GENERATED
    }
    assert ("docs/testing.md", "tests/lab/README.md") in named

    assert {each for each in named if not any(ROOT.glob(each[1].rstrip("/")))} == set()


def expanded(name: str) -> list[str]:
    """`a/{b,c}` as `a/b` and `a/c`."""
    head, brace, rest = name.partition("{")
    if not brace:
        return [name]
    choices, _, tail = rest.partition("}")
    return [f"{head}{choice}{tail}" for choice in choices.split(",")]


def test_modules_in_backticks_exist() -> None:
    named = set(hits(r"`((?:worker|handlers|schemas)(?:\.\w+){2,})`"))  # two parts: a log event

    assert {each for each in named if not is_module_or_name(each[1])} == set()


def is_module_or_name(dotted: str) -> bool:
    """Whether `a.b` is a module of the project, or `a.b.C` a name that its source mentions."""
    parts = dotted.split(".")
    for length in range(len(parts), 1, -1):
        source = ROOT.joinpath(*parts[:length]).with_suffix(".py")
        if source.is_file():
            return length == len(parts) or parts[length] in source.read_text(encoding="utf-8")
    return ROOT.joinpath(*parts).is_dir()


def test_every_test_named_on_a_page_exists() -> None:
    tests = "\n".join(read(path) for path in (ROOT / "tests").rglob("test_*.py"))
    named = {
        (name_of(page), name)
        for page in pages()
        for name in re.findall(r"`(test_\w+)`", read(page))
    }
    assert named

    assert {each for each in named if f"def {each[1]}(" not in tests} == set()


def test_the_map_lists_every_directory() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Map of the tree")[2].partition("\n### ")[0]
    mapped = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(mapped) == len(set(mapped))

    assert sorted(mapped) == sorted(directories())


def directories() -> Iterator[str]:
    """Every source directory that holds files of its own."""
    for top in SOURCES:
        for path, _, files in os.walk(ROOT / top):
            relative = os.path.relpath(path, ROOT)
            if files and "__pycache__" not in path:
                yield relative


def test_no_directory_has_more_than_20_modules() -> None:
    crowded = {
        name_of(directory): count
        for directory in {path.parent for top in SOURCES for path in (ROOT / top).rglob("*.py")}
        if (count := sum(1 for each in directory.glob("*.py") if each.name != "__init__.py")) > 20
    }

    assert crowded == {}
