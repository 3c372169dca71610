"""Which commit the code is of, from the record of a package or from a checkout."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from worker.cli.main import main
from worker.release.build import UNKNOWN, build_of, this_build

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".git/refs/heads").mkdir(parents=True)
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/main\n")
    return tmp_path


def commit_of(root: Path) -> str:
    return build_of(root / "nowhere", root).commit


def test_the_commit_of_a_checkout_is_that_of_its_head(checkout: Path) -> None:
    (checkout / ".git/refs/heads/main").write_text(f"{SHA}\n")

    assert commit_of(checkout) == SHA
    assert str(build_of(checkout, checkout)).endswith(f", commit {SHA[:12]} (checkout)")


def test_a_packed_branch_and_a_detached_head_are_read(checkout: Path) -> None:
    packed = f"# pack-refs with: peeled\n{OTHER} refs/heads/other\n{SHA} refs/heads/main\n"
    (checkout / ".git/packed-refs").write_text(packed)
    assert commit_of(checkout) == SHA

    (checkout / ".git/HEAD").write_text(f"{OTHER}\n")
    assert commit_of(checkout) == OTHER


def test_a_worktree_has_its_own_head_and_the_branches_of_its_repository(
    checkout: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "pyproject.toml").touch()
    (there / ".git").write_text(f"gitdir: {checkout}/.git/worktrees/there\n")
    own = checkout / ".git/worktrees/there"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/side\n")
    (own / "commondir").write_text("../..\n")
    (checkout / ".git/refs/heads/side").write_text(f"{SHA}\n")

    assert commit_of(there) == SHA


@pytest.mark.parametrize(
    "head",
    [
        "ref: refs/heads/../../../secret",
        "ref: refs/heads/none",
        "ref: /etc/passwd",
        "",
        "\n",
        "0" * 39,
    ],
)
def test_what_is_no_head_is_unknown(checkout: Path, head: str) -> None:
    (checkout / "secret").write_text(SHA)
    (checkout / ".git/HEAD").write_text(head)

    assert commit_of(checkout) == UNKNOWN


def test_without_git_or_a_record_it_is_unknown(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == UNKNOWN


@pytest.mark.parametrize("commit", [SHA, f"{SHA}+"])
def test_a_record_counts_before_a_checkout(checkout: Path, commit: str) -> None:
    (checkout / ".git/refs/heads/main").write_text(OTHER)
    (checkout / "commit.txt").write_text(f"{commit}\n")

    found = build_of(checkout, checkout)

    assert (found.commit, found.origin) == (commit, "package")


@pytest.mark.parametrize("text", ["", "main", "0" * 39, f"{SHA}\n{OTHER}"])
def test_a_record_that_is_none_is_left_out(checkout: Path, text: str) -> None:
    (checkout / ".git/refs/heads/main").write_text(SHA)
    (checkout / "commit.txt").write_text(text)

    assert build_of(checkout, checkout).origin == "checkout"


def test_the_command_line_says_version_and_commit() -> None:
    result = CliRunner().invoke(main, ["--version"])

    assert (result.exit_code, result.output) == (0, f"hostd, version {this_build()}\n")


@pytest.mark.parametrize("packed", [False, True])
def test_a_repository_is_read_as_git_reads_it(tmp_path: Path, *, packed: bool) -> None:
    program = shutil.which("git", path=os.defpath)
    assert program, "git, by which this project comes, is missing"

    def git(*args: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        command = [program, "-C", str(tmp_path), *identity, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "pyproject.toml").touch()
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=one")
    if packed:
        git("pack-refs", "--all")

    assert commit_of(tmp_path) == git("rev-parse", "HEAD")
