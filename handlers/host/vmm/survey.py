"""What running VMMs lack of what their launches made: files of the jail, their place in the tree.

For the periodic pass: reads only, a few system calls per VMM. None of it can be made again while
the VMM runs: a socket that was unlinked is bound to no name, an executable has no file any more.
"""

import os
import stat
from collections.abc import Mapping, Sequence

from handlers.host.linux.file_id import FileId
from handlers.host.vmm.processes import read_identity
from handlers.jail_names import API_SOCKET, FIRECRACKER, VSOCK_SOCKET
from schemas.records import VmmIdentity


def lacking(vmms: Mapping[str, VmmIdentity]) -> dict[str, Sequence[str]]:
    """By the jail's root directory, what its VMM lacks; a VMM that has exited lacks nothing.

    Needs: CAP_SYS_PTRACE.
    """
    found: dict[str, Sequence[str]] = {}
    for root, launched in vmms.items():
        # What was read is true of the process only if it still lives.
        if (missing := _lacking(root, launched)) and read_identity(launched.pid) is not None:
            found[root] = missing
    return found


def _lacking(root: str, launched: VmmIdentity) -> list[str]:
    now = read_identity(launched.pid)
    if now is None or now.start_ticks != launched.start_ticks or now.boot_id != launched.boot_id:
        return []  # it has exited, which its watch handles
    missing: list[str] = []
    if now.cgroup != launched.cgroup:
        missing.append("its cgroup")
    if FileId.at(root) != FileId.at(f"/proc/{launched.pid}/root"):
        return [*missing, "its directory"]
    if FileId.at(f"{root}/{FIRECRACKER}") != FileId(launched.exe_dev, launched.exe_ino):
        missing.append(FIRECRACKER)
    missing += [name for name in (API_SOCKET, VSOCK_SOCKET) if not _is_socket(f"{root}/{name}")]
    return missing


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
