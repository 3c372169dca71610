"""Cleanup after a temporary host (demo, tests): removes its VMMs, cgroups, mounts and files.

Such a host has a private cgroup tree, network namespace and directory.
Never for a real host: there hostd removes nothing that it cannot prove to be its own.
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from handlers.host.linux.procfs import read_mounts
from handlers.host.linux.syscalls import unmount
from handlers.host.vmm.cgroups import CgroupTree
from schemas.settings import Settings

EMPTY_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.01


def remove_host(settings: Settings, directory: str) -> list[str]:
    """Kill all processes in the settings' cgroup tree, then remove the tree and the directory.

    Idempotent. Blocks until done.

    Returns:
        One line for each cgroup that could not be removed.

    Source: cgroups(7), `cgroup.kill` and `cgroup.events`; umount2(2). Needs: CAP_SYS_ADMIN.
    """
    tree = CgroupTree.of(settings)
    remaining = list(_remove_cgroups(Path(tree.path(tree.base))))
    for mount in reversed(_mounts_below(directory)):
        unmount(mount, detach=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
    return remaining


def _remove_cgroups(top: Path) -> Iterator[str]:
    if not top.exists():
        return
    (top / "cgroup.kill").write_text("1", encoding="ascii")
    until = time.monotonic() + EMPTY_TIMEOUT_S
    while _populated(top) and time.monotonic() < until:
        time.sleep(POLL_INTERVAL_S)
    for path in sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True):
        yield from _remove_cgroup(path)
    yield from _remove_cgroup(top)


def _remove_cgroup(path: Path) -> Iterator[str]:
    try:
        path.rmdir()
    except OSError as error:
        if error.errno != errno.ENOENT:
            yield f"cgroup {path}: {error.strerror}"


def _populated(top: Path) -> bool:
    return "populated 1" in (top / "cgroup.events").read_text(encoding="ascii")


def _mounts_below(directory: str) -> list[str]:
    """Mount points, parents first."""
    inside = os.path.realpath(directory) + "/"
    points = [mount.mount_point for mount in read_mounts()]
    return [point for point in points if point.startswith(inside)]
