"""A directory that somebody else fills costs time, never memory."""

import ast
import os
import tracemalloc
from pathlib import Path

import pytest

from handlers.errors import Invalid
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.rmtree import remove_names, remove_tree

ROOT = Path(__file__).parents[3]
ENTRIES = 4_000
PEAK_BYTES = 1 << 17  # a list of the names alone takes 300 kB
# What is listed as a whole: directories that only root fills, and /proc.
ONLY_ROOT_FILLS = {
    "handlers/host/facts.py",
    "handlers/host/jail/layout.py",
    "handlers/host/jail/logs.py",
    "handlers/host/jail/warm_jails.py",
    "handlers/host/linux/procfs.py",
    "handlers/host/net/nft/libnftables.py",  # hostd's own descriptors
    "handlers/host/snapshot/discards.py",
    "handlers/host/snapshot/manifest.py",
    "handlers/host/storage/data_disks.py",
    "handlers/host/storage/disk_proof.py",
    "handlers/host/vmm/binaries.py",
    "handlers/host/vmm/binary_files.py",
    "handlers/host/vmm/cgroups.py",
    "handlers/host/vmm/confinement.py",
    "handlers/host/vmm/warm_vmms.py",
    "worker/control/dump.py",
    "worker/descriptors.py",
    "worker/demo/cleanup.py",
    "worker/journal/migration/backup.py",
}


@pytest.mark.parametrize("kind", ["files", "directories", "full directories"])
@pytest.mark.parametrize("how", ["tree", "names"])
def test_a_removal_does_not_hold_all_names(tmp_path: Path, kind: str, how: str) -> None:
    entries = ENTRIES if kind == "files" else ENTRIES // 2
    top = tmp_path / "top"
    top.mkdir()
    for number in range(entries):
        path = top / f"{number}-a-name-that-is-not-so-short"
        if kind == "files":
            path.touch()
        else:
            path.mkdir()
            if kind == "full directories":
                (path / "file").touch()
    parent = os.open(tmp_path, os.O_RDONLY)
    inside = os.open(top, os.O_RDONLY)
    tracemalloc.start()
    try:
        if how == "tree":
            remove_tree(parent, "top")
        else:
            remove_names(inside)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        os.close(parent)
        os.close(inside)

    assert peak < PEAK_BYTES
    assert [*tmp_path.rglob("*")] == ([] if how == "tree" else [top])


def test_a_listing_ends_at_its_limit(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / str(number)).touch()

    with Directory.trusted(str(tmp_path)) as directory:
        assert sorted(directory.names(5)) == ["0", "1", "2", "3", "4"]
        with pytest.raises(Invalid, match="more than 4 entries"):
            directory.names(4)


def test_only_directories_of_roots_are_listed_as_a_whole() -> None:
    listing = {
        str(path.relative_to(ROOT))
        for package in ("handlers", "worker", "schemas")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"listdir", "iterdir", "glob", "rglob"}
    }

    assert listing == ONLY_ROOT_FILLS
