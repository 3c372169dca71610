"""Files of /proc and of the cgroup tree as text, and the formats that more than one module reads.

By descriptor: a launch reads a dozen, and `pathlib` takes three times as long.
"""

import os
import re
from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from handlers.host.linux.small_files import read_up_to

TEXT_BYTES = 64 << 20  # the largest, of mounts, has some 100 bytes a line
OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One mount. `device` is `<major>:<minor>`, as in st_dev of what is on it."""

    device: str
    mount_point: str
    fs_type: str


def read_text(path: str) -> str:
    """The whole file; bytes that are not UTF-8 are replaced.

    Raises:
        OSError: it cannot be opened, or the process or cgroup that it describes is gone.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_up_to(fd, TEXT_BYTES).decode(errors="replace")
    finally:
        os.close(fd)


def list_pids() -> list[int]:
    """All processes of this pid namespace, in ascending order; some may have ended on return."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


@cache
def boot_id() -> str:
    """The ID of this boot; under another one every process known before is gone.

    Source: proc_sys_kernel(5).
    """
    return read_text("/proc/sys/kernel/random/boot_id").strip()


def read_mounts() -> list[Mount]:
    """The mounts of this process's mount namespace, parents first."""
    return parse_mounts(read_text("/proc/self/mountinfo"))


def parse_mounts(mountinfo: str) -> list[Mount]:
    """Source: proc_pid_mountinfo(5)."""
    mounts: list[Mount] = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        mounts.append(Mount(fields[2], _unescape(fields[4]), right.split(" ", 1)[0]))
    return mounts


def read_status(path: str, names: Collection[str]) -> dict[str, str]:
    """These fields of a `status` file of a process or thread, e.g. `Uid` -> `0 0 0 0`, as far as
    they are there. A file has some 60, so only these are looked for.

    Source: proc_pid_status(5).
    """
    text = f"\n{read_text(path)}\n"
    return {
        name: " ".join(text[at + len(name) + 2 : text.find("\n", at + 1)].split())
        for name in names
        if (at := text.find(f"\n{name}:")) >= 0
    }


def _unescape(field: str) -> str:
    """Undo the kernel's octal escapes of blank, tab, newline and backslash."""
    return OCTAL_ESCAPE.sub(lambda escape: chr(int(escape[1], 8)), field)
