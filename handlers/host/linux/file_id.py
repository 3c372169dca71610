"""A file by device and inode: what stays the same when its name changes."""

import os

import msgspec


class FileId(msgspec.Struct, frozen=True):
    dev: int
    ino: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileId":
        return cls(status.st_dev, status.st_ino)

    @classmethod
    def at(cls, path: str) -> "FileId | None":
        """The file that a path or magic link of /proc resolves to; None if there is none."""
        try:
            return cls.of(os.stat(path))
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            return None
