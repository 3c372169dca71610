"""Runs tests against each version of Firecracker in `HOSTD_TEST_FIRECRACKER_DIR`.

    python -m tests.guests.versions tests/contract tests/vm [further arguments of pytest]

The directory is laid out as `[vmm] versions_dir`: `firecracker-vX.Y.Z` and `jailer-vX.Y.Z`. Without
the variable there is nothing to do. The exit code is that of the first run that failed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.guests import cache
from tests.guests.firecracker import SHA256, UNDER_TEST

VARIABLE = "HOSTD_TEST_FIRECRACKER_DIR"
NAME = re.compile(r"firecracker-v([0-9]+\.[0-9]+\.[0-9]+)")


def found(directory: Path) -> list[str]:
    """The versions that are there, both programs of them, oldest first."""
    named = [match[1] for path in directory.iterdir() if (match := NAME.fullmatch(path.name))]
    pairs = [each for each in named if (directory / f"jailer-v{each}").exists()]
    return sorted(pairs, key=lambda version: [int(part) for part in version.split(".")])


def laid_out(directory: Path, version: str, to: Path) -> Path:
    """The pair under the names that the jailer needs, in a directory `v<version>`."""
    here = to / f"v{version}"
    here.mkdir(parents=True, exist_ok=True)
    for program in SHA256:
        shutil.copy(directory / f"{program}-v{version}", here / program)
        (here / program).chmod(0o755)
    return here


def main(arguments: list[str]) -> int:
    """Run pytest once per version."""
    directory = os.environ.get(VARIABLE)
    worst = 0
    for version in found(Path(directory)) if directory else []:
        programs = laid_out(Path(directory or ""), version, cache.BUILD / "firecrackers")
        print(f"Firecracker {version}:", flush=True)
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            env={**os.environ, UNDER_TEST: str(programs)},
            check=False,
        ).returncode
        worst = worst or code
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
