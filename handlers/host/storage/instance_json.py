"""Updates of agentd's `instance.json`, of which hostd changes its own fields and nothing else.

An update can be prepared: its content is then written and synced in a file without a name, which
is gone if it is not used, also after kill -9.
"""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from handlers.errors import Invalid, Unavailable
from handlers.host.linux.file_threads import HandedFd, run_in_thread
from handlers.host.linux.openat2 import Directory

INSTANCE = "instance.json"
JSON_MAX_BYTES = 1 << 20
OURS = frozenset(
    {
        "status",
        "firecracker_pid",
        "revision_hash",
        "last_started_at",
        "last_stopped_at",
        "entered_running_at",
        "entered_warm_at",
    }
)
STATUSES = frozenset({"created", "ready", "running", "warm", "sleeping", "stopped"})
REREADS = 8


@dataclass(frozen=True, slots=True)
class PreparedFile:
    """The update `changes` of the file with the status `read`: `fd` has its new content.

    `reopen` opens the directory again: agentd may have replaced it.
    """

    changes: dict[str, Any]
    read: os.stat_result
    fd: HandedFd
    reopen: Callable[[], Directory]

    async def apply(self, changes: dict[str, Any]) -> bool:
        if changes != self.changes:
            return False
        return await run_in_thread(self._apply)

    def _apply(self) -> bool:
        with self.fd.taken() as fd, self.reopen() as directory:
            now = directory.stat(INSTANCE)
            if now is None or not _same(now, self.read):
                return False
            try:
                directory.replace_by(INSTANCE, fd)
            except OSError:  # e.g. on another file system by now
                return False
            return True

    def close(self) -> None:
        self.fd.close()


def checked(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes as they are written.

    Raises:
        ValueError: not a field or a status of hostd's.
    """
    changes = dict(changes)
    if changes.get("status") == "failed":
        changes["status"] = "stopped"
    if not changes.keys() <= OURS or changes.get("status", "ready") not in STATUSES:
        raise ValueError(
            f"cannot update instance.json: not a field or status of hostd's: {changes}"
        )
    return changes


def prepare(
    directory: Directory, changes: dict[str, Any], new: HandedFd, *, reopen: Callable[[], Directory]
) -> PreparedFile | None:
    """Write the content of an update, to be `new`; None if it cannot be written: then `update` says
    why."""
    data, read = directory.read(INSTANCE, JSON_MAX_BYTES)
    content = merged(data, checked(changes), directory.named(INSTANCE))
    mode = stat.S_IMODE(read.st_mode) & 0o777
    try:
        new.put(directory.unnamed(content, uid=read.st_uid, gid=read.st_gid, mode=mode))
    except OSError:
        return None
    return PreparedFile(dict(changes), read, new, reopen)


def update(directory: Directory, changes: dict[str, Any]) -> None:
    """Change the file, if it is another one afterwards; it is read again if agentd writes it."""
    path = directory.named(INSTANCE)
    for _ in range(REREADS):
        data, read = directory.read(INSTANCE, JSON_MAX_BYTES)
        new = merged(data, changes, path)
        if new == data:
            return
        now = directory.stat(INSTANCE)
        if now is not None and _same(now, read):
            mode = stat.S_IMODE(read.st_mode) & 0o777
            directory.replace(INSTANCE, new, uid=read.st_uid, gid=read.st_gid, mode=mode)
            return
    raise Unavailable(f"{path} changed during {REREADS} updates: try again", path=path)


def merged(data: bytes, changes: dict[str, Any], path: str) -> bytes:
    """The JSON object with some values changed or added, and every other value's bytes kept.

    Raises:
        Invalid: not a JSON object.
    """
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{path} is not a JSON object", path=path) from error
    old = {key: bytes(value) for key, value in fields.items()}
    new = {key: msgspec.json.encode(value) for key, value in changes.items()}
    if all(old.get(key) == value for key, value in new.items()):
        return data
    lines = [msgspec.json.encode(key) + b": " + value for key, value in {**old, **new}.items()]
    return b"{\n  " + b",\n  ".join(lines) + b"\n}\n"


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino, one.st_ctime_ns, one.st_size) == (
        other.st_dev,
        other.st_ino,
        other.st_ctime_ns,
        other.st_size,
    )
