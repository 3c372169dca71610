"""Small state files of hostd: JSON with a checksum, replaced atomically.

A file with a flipped bit, or one that was partly written, is reported as damaged and never used.
"""

import hashlib
import os
from typing import TypeVar

import msgspec

from handlers.errors import HostFault
from handlers.host.linux.small_files import read_up_to, write_all

MAX_BYTES = 1 << 20

T = TypeVar("T")


class Sealed(msgspec.Struct, frozen=True):
    """`sha256` is that of the bytes of `facts` as they are in the file."""

    sha256: str
    facts: msgspec.Raw


def write_sealed(path: str, facts: msgspec.Struct, *, sync: bool = True) -> None:
    """Write or replace a file, root:root 0600. The caller syncs the directory if that matters."""
    body = msgspec.json.encode(facts)
    data = msgspec.json.encode(Sealed(hashlib.sha256(body).hexdigest(), msgspec.Raw(body)))
    beside = f"{path}.part"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, data + b"\n")
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(beside, path)


def read_sealed(path: str, kind: type[T]) -> T | None:
    """The facts, or None if there is no such file.

    Raises:
        HostFault: damaged; names the file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        data = read_up_to(fd, MAX_BYTES)
    finally:
        os.close(fd)
    try:
        sealed = msgspec.json.decode(data, type=Sealed)
        if hashlib.sha256(sealed.facts).hexdigest() == sealed.sha256:
            return msgspec.json.decode(sealed.facts, type=kind)
    except (ValueError, RecursionError) as error:
        raise HostFault(f"{path} is damaged: not a checksummed JSON object", path=path) from error
    raise HostFault(f"{path} is damaged: the checksum of its facts does not match", path=path)
