"""The images of the two small drives, `mvm-config` and `mvm-secrets`: one file in a small ext4.

Each size of content has a template, made once with `mkfs.ext4 -d` and kept as its few blocks that
are not zero; an image is the template with the content's bytes, the file's size and times put in
at the known places. That is 0.1 ms instead of a process each start. The format has no metadata
checksums, so nothing else changes; where a template is not as expected, mkfs does the work.

Images have a fixed size, so that a drive created for a wake has the size that the guest expects.
Source: Linux Documentation/filesystems/ext4 (super block, group descriptors, inode table).
"""

import os
import struct
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from handlers.errors import Invalid
from handlers.host.linux.sparse_copy import copy_sparse
from handlers.host.storage.mkfs import make_ext4

BLOCK = 4096
INODES = 16
FEATURES = "^has_journal,^metadata_csum,^uninit_bg,^resize_inode,^64bit"
TEMPLATES_KEPT = 32
FIRST_INODE = 11
S_IFREG = 0o100000


@dataclass(frozen=True, slots=True)
class SmallDrive:
    """One kind of small drive; `mode` is that of the file in it."""

    label: str
    file_name: str
    size_bytes: int
    mode: int

    @property
    def content_max_bytes(self) -> int:
        return self.size_bytes // 2


CONFIG = SmallDrive("mvm-config", "config.json", 4 << 20, 0o444)
SECRETS = SmallDrive("mvm-secrets", "secrets.json", 16 << 20, 0o400)


@dataclass(frozen=True, slots=True)
class Template:
    """An image without content: its blocks that are not zero, and where the content goes."""

    blocks: tuple[tuple[int, bytes], ...]
    content_at: int
    inode_at: int


class SmallDrives:
    """Writes images; holds the templates. Safe to use from several threads."""

    def __init__(self) -> None:
        self._templates: OrderedDict[tuple[str, int], Template | None] = OrderedDict()
        self._lock = threading.Lock()

    def write(self, fd: int, drive: SmallDrive, content: bytes) -> None:
        """Make the empty file `fd` an image of the drive's fixed size that holds the content.

        Raises:
            Invalid: more content than half the drive.
            HostFault: mkfs.ext4 is missing or fails.
        """
        if len(content) > drive.content_max_bytes:
            raise Invalid(
                f"{drive.file_name} is {len(content)} bytes, the limit is {drive.content_max_bytes}"
            )
        os.ftruncate(fd, drive.size_bytes)
        template = self._template(drive, max(1, -(-len(content) // BLOCK)))
        if template is None or not content:
            _mkfs(fd, drive, content)
            return
        for at, block in template.blocks:
            os.pwrite(fd, block, at)
        os.pwrite(fd, content, template.content_at)
        now = int(time.time()) & 0xFFFF_FFFF
        # i_size_lo, i_atime, i_ctime, i_mtime
        os.pwrite(fd, struct.pack("<IIII", len(content), now, now, now), template.inode_at + 4)

    def _template(self, drive: SmallDrive, blocks: int) -> Template | None:
        key = (drive.label, blocks)
        with self._lock:
            if key not in self._templates:
                self._templates[key] = _make_template(drive, blocks)
                while len(self._templates) > TEMPLATES_KEPT:
                    self._templates.popitem(last=False)
            self._templates.move_to_end(key)
            return self._templates[key]


def copy_drive(kept: str, fd: int) -> None:
    """Make the empty file `fd` what an image kept with a snapshot is.

    Never a hard link to it: only root may read the image, and the VMM reads the copy.
    """
    source = os.open(kept, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        copy_sparse(source, fd)
    finally:
        os.close(source)


def _mkfs(fd: int, drive: SmallDrive, content: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="hostd-drive-", dir="/dev/shm") as directory:
        os.chmod(directory, 0o755)  # noqa: S103 - becomes the drive's root
        path = f"{directory}/{drive.file_name}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(file, "wb") as out:
            out.write(content)
            os.fchmod(file, drive.mode)
        options = ("-b", str(BLOCK), "-N", str(INODES), "-m", "0", "-O", FEATURES, "-d", directory)
        make_ext4(fd, label=drive.label, options=options)


def _make_template(drive: SmallDrive, blocks: int) -> Template | None:
    """None if the image is not laid out as expected; then every image takes the slow way."""
    pattern = b"".join(struct.pack("<QQ", 0x0064_7473_6F68, n) for n in range(blocks * BLOCK // 16))
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), drive.size_bytes)
        _mkfs(file.fileno(), drive, pattern)
        image = os.pread(file.fileno(), drive.size_bytes, 0)
    content_at = image.find(pattern)
    inode_at = _find_inode(image, len(pattern), drive.mode)
    if content_at < 0 or inode_at is None:
        return None
    bare = image[:content_at] + bytes(len(pattern)) + image[content_at + len(pattern) :]
    used = tuple(
        (at, bare[at : at + BLOCK])
        for at in range(0, len(bare), BLOCK)
        if any(bare[at : at + BLOCK])
    )
    return Template(used, content_at, inode_at)


def _find_inode(image: bytes, size: int, mode: int) -> int | None:
    """Where the inode of the one regular file of that size and mode is in the inode table."""
    (inodes,) = struct.unpack_from("<I", image, 1024)
    (inode_size,) = struct.unpack_from("<H", image, 1024 + 88)
    (table,) = struct.unpack_from("<I", image, BLOCK + 8)
    found = [
        at
        for number in range(FIRST_INODE, inodes + 1)
        if struct.unpack_from("<H", image, at := table * BLOCK + (number - 1) * inode_size)[0]
        == S_IFREG | mode
        and struct.unpack_from("<I", image, at + 4)[0] == size
    ]
    return found[0] if len(found) == 1 else None
