"""The files of Firecracker's versions: found in the operator's directory, checked, copied, hashed.

All functions block.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Mapping
from typing import Final

from handlers.errors import HostFault
from handlers.host.linux.file_id import FileId
from handlers.host.vmm.versions import parse_version
from handlers.jail_names import FIRECRACKER

JAILER: Final = "jailer"
PROGRAMS: Final = (FIRECRACKER, JAILER)
NAME: Final = re.compile(r"(firecracker|jailer)-v([0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4})")
CHUNK_BYTES: Final = 1 << 20
PAIRS_MAX: Final = 32  # of a directory with more, the newest

Stamp = tuple[FileId, int, int, int] | None
"""File, size, mtime and ctime (ns): a file that has the same was not changed."""


def read_sources(directory: str) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """The pairs in the directory by version, and why some versions are none. Other names are
    ignored.

    Raises:
        HostFault: the directory is not root's alone to write, or cannot be read.
    """
    try:
        check_owner(directory, os.stat(directory))
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise HostFault(f"[vmm] versions_dir {directory}: {error.strerror}") from error
    found = {match[2] for match in map(NAME.fullmatch, names) if match is not None}
    pairs, problems = dict[str, tuple[str, str]](), dict[str, str]()
    for version in sorted(found, key=parse_version)[-PAIRS_MAX:]:
        paths = f"{directory}/firecracker-v{version}", f"{directory}/jailer-v{version}"
        try:
            for path in paths:
                check_program(path)
        except HostFault as error:
            problems[version] = str(error)
        else:
            pairs[version] = paths
    return pairs, problems


def check_program(path: str) -> None:
    """Raise HostFault unless it is a regular, executable file that only root can write."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise HostFault(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise HostFault(f"{path} is not a regular file")
    if not found.st_mode & stat.S_IXUSR:
        raise HostFault(f"{path} is not executable")
    check_owner(path, found)


def check_owner(path: str, found: os.stat_result) -> None:
    """Raise HostFault if anyone but root may write it."""
    if found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise HostFault(
            f"{path} has uid {found.st_uid} and mode {stat.S_IMODE(found.st_mode):04o}: it must "
            "belong to root, and only root may write it"
        )


def copy_pair(sources: tuple[str, str], copies: tuple[str, str], sha256: Mapping[str, str]) -> None:
    """Make copies of this content, in a directory of root's alone.

    All may execute them: the jailer copies the file with its mode, and the jail's uid executes it.

    Raises:
        HostFault: a source changed since its sum was taken.
    """
    os.makedirs(os.path.dirname(copies[0]), mode=0o700, exist_ok=True)
    for source, copy in zip(sources, copies, strict=True):
        with open(source, "rb") as found, open(copy, "wb") as made:
            shutil.copyfileobj(found, made, CHUNK_BYTES)
            os.fchmod(made.fileno(), 0o755)
            made.flush()
            os.fsync(made.fileno())
    if digests(copies) != sha256:
        raise HostFault(f"{sources[0]}, or the jailer, changed while it was copied")


def move_pair(old: tuple[str, str], new: tuple[str, str]) -> None:
    """Put the copies in their place; those that are executed at the moment live on."""
    os.makedirs(os.path.dirname(new[0]), mode=0o700, exist_ok=True)
    for path, to in zip(old, new, strict=True):
        os.replace(path, to)
    os.rmdir(os.path.dirname(old[0]))


def digests(paths: tuple[str, str]) -> dict[str, str]:
    """The sha256 in hex of each program that there is."""
    sums: dict[str, str] = {}
    for program, path in zip(PROGRAMS, paths, strict=True):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            sums[program] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def stamp_of(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return FileId.of(found), found.st_size, found.st_mtime_ns, found.st_ctime_ns
