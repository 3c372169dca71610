"""The supported versions of Firecracker: one place, and every text that repeats it."""

import re
from pathlib import Path

import pytest

from handlers.errors import HostFault
from handlers.host.vmm.versions import NEWEST, OLDEST, lacks, parse_version, supported

ROOT = Path(__file__).parents[3]
RANGE = re.compile(r"\b1\.\d+ to 1\.\d+\b")
TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.toml")),
    *sorted((ROOT / "handlers").rglob("*.py")),
]


def test_every_text_names_the_range_that_is_checked() -> None:
    named = {
        str(path.relative_to(ROOT)): set(RANGE.findall(path.read_text(encoding="utf-8")))
        for path in TEXTS
    }

    assert {path: ranges for path, ranges in named.items() if ranges - {supported()}} == {}
    places = {path for path, ranges in named.items() if ranges}
    assert places >= {
        "README.md",
        "deploy/config/hostd.toml",
        "handlers/host/vmm/api_schema.py",
    }


@pytest.mark.parametrize(("text", "version"), [("1.12.1", (1, 12, 1)), ("v1.16.0-dev", (1, 16, 0))])
def test_a_version_is_read_as_numbers(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


def test_what_a_version_lacks_is_known_and_ever_less() -> None:
    oldest, newest = lacks((*OLDEST, 0)), lacks((*NEWEST, 0))
    assert newest == []
    assert any("serial console" in each for each in oldest)
    for minor in range(OLDEST[1], NEWEST[1]):
        assert set(lacks((1, minor + 1, 0))) <= set(lacks((1, minor, 9)))


def test_a_text_that_is_not_a_version_is_a_host_fault() -> None:
    with pytest.raises(HostFault, match=r"want e\.g\. 1\.12\.1"):
        parse_version("latest")
