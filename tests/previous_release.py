"""The release before this one, built from this repository's history as it would be installed."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.guests.cache import REPOSITORY

COMMIT: Final = "0fd7ff5210a476cdf9942b6a0ba2b4aca5c4762a"
built: list["Release"] = []  # by this process, for the summary of the run
ASK: Final = """
import json, msgspec, worker
from schemas.settings import Settings
tables = msgspec.to_builtins(Settings())
names = [f"HOSTD_{table}_{key}".upper() for table, keys in tables.items() for key in keys]
print(json.dumps([worker.__file__, names]))
"""


@dataclass(frozen=True, slots=True)
class Release:
    """`code` goes to PYTHONPATH; `settings` are the variables that it knows. `source` says what it
    was built from, for the summary of the run."""

    code: str
    settings: frozenset[str]
    source: str


def previous_release(directory: str, commit: str = COMMIT) -> Release:
    """Build its wheel and unpack it below the directory.

    Where the history lacks that commit, as in a shallow clone, this tree is taken for its own
    predecessor, and `source` says so.
    """
    sources, source = f"{directory}/source", f"commit {commit[:12]}"
    os.mkdir(sources)
    try:
        archive = _run(["git", "-C", str(REPOSITORY), "archive", commit])
        subprocess.run(["tar", "-x", "-C", sources], input=archive, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        sources = str(REPOSITORY)
        source = f"this tree itself: the history lacks commit {commit[:12]} (a shallow clone?)"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory]
    _run([*build, sources])
    (wheel,) = Path(directory).glob("*.whl")
    code = f"{directory}/code"
    with zipfile.ZipFile(wheel) as files:
        files.extractall(code)
    known = _run([sys.executable, "-P", "-c", ASK], os.environ | {"PYTHONPATH": code})
    file, names = json.loads(known)
    assert file.startswith(code), file
    release = Release(code, frozenset(names), source)
    built.append(release)
    return release


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> bytes:
    done = subprocess.run(
        command, env=environment, capture_output=True, check=True, timeout=120, cwd="/"
    )
    return done.stdout
