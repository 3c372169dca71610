"""Jails' uids are nobody else's: overlaps with users, groups and subordinate ids are found."""

from pathlib import Path

import pytest

from schemas.settings import Settings
from worker.cli import run
from worker.cli.context import CliError
from worker.cli.run import check_uids
from worker.uid_range import Taken, find_overlap

BASE, COUNT = 1000, 10


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    for name in ("passwd", "group", "subuid", "subgid"):
        (tmp_path / name).write_text("")
    return tuple(str(tmp_path / name) for name in ("passwd", "group", "subuid", "subgid"))


def test_this_machines_defaults_are_free() -> None:
    assert find_overlap(Settings().vmm.uid_base, Settings().vmm.uid_count) is None


@pytest.mark.parametrize(
    ("name", "line", "taken"),
    [
        ("passwd", "ann:x:1000:0::/:/bin/sh", ("ann", 1000, 1)),
        ("passwd", "bob:x:1009:0::/:/bin/sh", ("bob", 1009, 1)),
        ("group", "staff:x:1004:ann", ("staff", 1004, 1)),
        ("subuid", "ann:100:901", ("ann", 100, 901)),
        ("subgid", "ann:1009:65536", ("ann", 1009, 65536)),
    ],
)
def test_an_overlap_names_file_and_owner(
    files: tuple[str, ...], tmp_path: Path, name: str, line: str, taken: tuple[str, int, int]
) -> None:
    (tmp_path / name).write_text(f"root:x:0:0::/:/bin/sh\nbroken\n:::\n{line}\n")

    assert find_overlap(BASE, COUNT, files=files) == Taken(str(tmp_path / name), *taken)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("passwd", "ann:x:999:1000::/:/bin/sh"),
        ("passwd", "ann:x:1010:0::/:/bin/sh"),
        ("subuid", "ann:100:900"),
        ("subgid", "ann:1010:65536"),
    ],
)
def test_neighbours_are_no_overlap(
    files: tuple[str, ...], tmp_path: Path, name: str, line: str
) -> None:
    (tmp_path / name).write_text(f"{line}\n")

    assert find_overlap(BASE, COUNT, files=files) is None


def test_files_that_are_not_there_take_nothing(tmp_path: Path) -> None:
    assert find_overlap(BASE, COUNT, files=(f"{tmp_path}/passwd",)) is None


def test_a_worker_does_not_start_with_ids_that_somebody_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = Taken("/etc/subuid", "ann", 100_000, 65_536)

    def find(_base: int, _count: int) -> Taken:
        return taken

    monkeypatch.setattr(run, "find_overlap", find)

    with pytest.raises(CliError, match=r"invalid: vmm.uid_base.*/etc/subuid.*ann"):
        check_uids(Settings())
