"""Where built things live, and when they must be built anew. Knows nothing of what is built.

A target is a directory below build/ with a `.inputs` file: the digest of all that it is made from.
It is built beside its place and renamed into it, so that a reader never sees half of one, and under
one lock, so that two builds at once make it once.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build"


def digest(*parts: str | bytes | Path) -> str:
    """Hex sha256 over texts and the contents of files and directories, in the order given.

    A directory counts with the names and contents of its files; byte code and hidden files do not.
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for file in _files(part):
                sha.update(f"\0{file.relative_to(part.parent)}\0".encode())
                sha.update(file.read_bytes())
        else:
            sha.update(b"\0" + (part.encode() if isinstance(part, str) else part))
    return sha.hexdigest()


def _files(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file.suffix != ".pyc" and not file.name.startswith(".")
    )


@contextlib.contextmanager
def locked(name: str) -> Generator[None]:
    """Hold `build/.<name>.lock`: one process at a time builds the target of that name."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure(target: Path, inputs: str, make: Callable[[Path], None]) -> bool:
    """Make `target` by `make(empty directory)` unless it was made from the same inputs.

    Returns:
        True if it was built now, False if it was there.
    """
    name = "-".join(target.relative_to(BUILD).parts)
    with locked(name):
        if _stamp(target) == inputs:
            return False
        print(f"building {target.relative_to(REPOSITORY)}", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        make(fresh)
        (fresh / ".inputs").write_text(inputs)
        replaced = target.with_name(f".{target.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            os.rename(target, replaced)
        os.rename(fresh, target)
        shutil.rmtree(replaced, ignore_errors=True)
        return True


def _stamp(target: Path) -> str | None:
    try:
        return (target / ".inputs").read_text()
    except FileNotFoundError:
        return None
