"""The version and the commit that this code was built from, for `--version`, Pong and lease.

`deploy/build_hook.py` records the commit in a wheel or sdist as `commit.txt` beside this file. In a
checkout there is none: its commit is read from `.git`, without executing git, and says nothing of
changes that are not committed. Source: gitrepository-layout(5).
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

UNKNOWN: Final = "unknown"
RECORD: Final = "commit.txt"
SHA: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
REF: Final = re.compile(r"refs/[\w/-][\w./-]*")
SHOWN: Final = 12  # digits of the commit in text


@dataclass(frozen=True, slots=True)
class Build:
    """`commit` is 40 or 64 hexadecimal digits, followed by `+` if the tree had other changes, or
    `unknown`; `origin` is `package`, `checkout` or `unknown`."""

    version: str
    commit: str
    origin: str

    def __str__(self) -> str:
        if self.commit == UNKNOWN:
            return f"{self.version}, commit unknown"
        changed = "+" if self.commit.endswith("+") else ""
        return f"{self.version}, commit {self.commit[:SHOWN]}{changed} ({self.origin})"


@cache
def this_build() -> Build:
    """That of the running code."""
    return build_of(Path(__file__).parent, Path(__file__).parents[2])


def build_of(package: Path, root: Path) -> Build:
    """Of the code whose record would be in `package`, and whose checkout would be `root`."""
    if (commit := _recorded(package / RECORD)) is not None:
        return Build(version("hostd"), commit, "package")
    if (root / "pyproject.toml").is_file() and (commit := _checked_out(root / ".git")) is not None:
        return Build(version("hostd"), commit, "checkout")
    return Build(version("hostd"), UNKNOWN, UNKNOWN)


def _recorded(path: Path) -> str | None:
    try:
        commit = _text(path)
    except (OSError, UnicodeDecodeError):
        return None
    return commit if SHA.fullmatch(commit.rstrip("+")) else None


def _checked_out(git: Path) -> str | None:
    """The commit of HEAD, in a repository or one of its worktrees."""
    try:
        if git.is_file():
            git = git.parent / _text(git).removeprefix("gitdir: ")
        head = _text(git / "HEAD")
        if SHA.fullmatch(head):
            return head
        name = head.removeprefix("ref: ")
        if not REF.fullmatch(name) or ".." in name:
            return None
        common = git / _text(git / "commondir") if (git / "commondir").is_file() else git
        return _branch(common, name)
    except (OSError, UnicodeDecodeError):
        return None


def _branch(common: Path, name: str) -> str | None:
    """What a branch is at: in a file of its own, or packed with others."""
    if (common / name).is_file():
        commit = _text(common / name)
        return commit if SHA.fullmatch(commit) else None
    for line in _text(common / "packed-refs").splitlines():
        commit, _, ref = line.partition(" ")
        if ref == name and SHA.fullmatch(commit):
            return commit
    return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()
