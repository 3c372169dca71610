"""VMM logs and serial consoles: bounded while a VM runs, kept after it is gone.

The VMM writes both files, so neither content nor size is trusted. To bound them, holes are punched
over all but the last part, repeatedly: that loses the oldest lines, not the newest, and works at
whatever offset the VMM writes. While the worker is down nothing bounds them.
"""

import contextlib
import os
import re

from handlers.host.jail.layout import JailLayout, JailMetadata, launch_of
from handlers.host.linux.file_id import FileId
from handlers.host.linux.state_dirs import make_dir
from handlers.host.linux.syscalls import punch_hole
from handlers.jail_names import LOG, SERIAL
from schemas import naming
from schemas.requests import InstanceRef

KEPT_LAUNCHES = 3
KEPT_NAME = re.compile(r"([0-9]{1,18})\.(log|serial)")
BLOCK = 4096


class JailLogs:
    """Logs of live jails, and those kept in `<state>/logs/<t>/<p>/<i>/<launch>.{log,serial}`."""

    def __init__(self, layout: JailLayout, *, state: str, limit_bytes: int) -> None:
        self._layout = layout
        self._base = f"{state}/logs"
        self._limit = max(limit_bytes, BLOCK)
        self._known: dict[str, JailMetadata] = {}

    def bound(self) -> int:
        """Free what exceeds the limit in every live jail; returns the bytes freed."""
        jails = self._layout.list_ids()
        for gone in self._known.keys() - set(jails):
            del self._known[gone]
        freed = 0
        for jail_id in jails:
            metadata = self._known.get(jail_id) or self._layout.read_metadata(jail_id)
            if metadata is not None and metadata.complete:
                self._known[jail_id] = metadata
                freed += sum(self._bound(jail_id, metadata, name) for name in (LOG, SERIAL))
        return freed

    def keep(self, jail_id: str, metadata: JailMetadata) -> None:
        """Copy the last part of a jail's logs before its removal; delete those of old launches."""
        directory = f"{self._base}/{metadata.ref}"
        for name, suffix in ((LOG, "log"), (SERIAL, "serial")):
            data = self._read_live(jail_id, metadata, name)
            if data:
                make_dir(directory)
                beside = f"{directory}/.{metadata.launch}.{suffix}"
                fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with open(fd, "wb") as file:
                    file.write(data)
                os.rename(beside, f"{directory}/{metadata.launch}.{suffix}")
        kept = self._kept(metadata.ref)
        for launch in kept[KEPT_LAUNCHES:]:
            for suffix in ("log", "serial"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{directory}/{launch}.{suffix}")

    def read(self, ref: InstanceRef, launch: int | None) -> bytes:
        """The VMM's log of a launch, or of the last launch with a log; empty if there is none."""
        launches = self.launches(ref) if launch is None else [launch]
        for each in launches:
            jail_id = naming.jail_id(ref, each)
            metadata = self._layout.read_metadata(jail_id)
            data = self._read_live(jail_id, metadata, LOG) if metadata is not None else b""
            if not data:
                with (
                    contextlib.suppress(FileNotFoundError),
                    open(f"{self._base}/{ref}/{each}.log", "rb") as file,
                ):
                    data = file.read(self._limit)
            if data:
                return data
        return b""

    def launches(self, ref: InstanceRef) -> list[int]:
        """Launches with a jail or a kept log, the newest first."""
        live = [launch_of(each) for each in self._layout.ids_of(ref)]
        return sorted({*live, *self._kept(ref)}, reverse=True)

    def _kept(self, ref: InstanceRef) -> list[int]:
        try:
            names = os.listdir(f"{self._base}/{ref}")
        except FileNotFoundError:
            return []
        launches = {int(found[1]) for name in names if (found := KEPT_NAME.fullmatch(name))}
        return sorted(launches, reverse=True)

    def _read_live(self, jail_id: str, metadata: JailMetadata, name: str) -> bytes:
        with self._layout.file(jail_id, name) as fd:
            if fd is None or metadata.ours.get(name) != FileId.of(os.fstat(fd)):
                return b""
            size = os.fstat(fd).st_size
            return os.pread(fd, self._limit, max(0, size - self._limit)).lstrip(b"\0")

    def _bound(self, jail_id: str, metadata: JailMetadata, name: str) -> int:
        expected = metadata.ours.get(name)
        if expected is None:
            return 0
        try:
            found = os.stat(f"{self._layout.root(jail_id)}/{name}", follow_symlinks=False)
        except FileNotFoundError:
            return 0
        if found.st_blocks * 512 <= self._limit + BLOCK:
            return 0
        with self._layout.file(jail_id, name, os.O_RDWR) as fd:
            # The VMM may have moved a shared artifact to this name: cut only the file hostd made.
            if fd is None or FileId.of(os.fstat(fd)) != expected:
                # Or the jail was made again under its ID, by a launch that was tried again.
                self._known.pop(jail_id, None)
                return 0
            before = os.fstat(fd)
            end = (before.st_size - self._limit) // BLOCK * BLOCK
            if end > 0:
                punch_hole(fd, 0, end)
            return max(0, before.st_blocks - os.fstat(fd).st_blocks) * 512
