"""Records the commit in what is built, as `worker/release/commit.txt`: a hook of hatchling.

The commit is `$HOSTD_COMMIT`, else that of the checkout, with a `+` if it had changes; a build from
an sdist keeps what the sdist recorded. Without any there is no record.
"""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

RECORD = "worker/release/commit.txt"


class CommitHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's own default
    """Adds the record to a wheel and to an sdist, not to an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or Path(self.root, RECORD).is_file():
            return
        if commit := os.environ.get("HOSTD_COMMIT") or _commit(self.root):
            self._scratch = tempfile.TemporaryDirectory()
            made = Path(self._scratch.name, "commit.txt")
            made.write_text(commit, encoding="ascii")
            build_data["force_include"][str(made)] = RECORD


def _commit(root: str) -> str:
    if not Path(root, ".git").exists():
        return ""  # not that of a repository around an unpacked sdist
    head = _git(root, "rev-parse", "HEAD")
    return f"{head}+" if head and _git(root, "status", "--porcelain", "-uno") else head


def _git(root: str, *args: str) -> str:
    try:
        done = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
