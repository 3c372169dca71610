"""Small files by descriptor, in as few system calls as there can be.

A launch reads and writes two dozen of them. A file object costs four calls more (its status twice,
whether it is a terminal, its position), and a buffer as large as the limit.
"""

import os

CHUNK_BYTES = 65_536


def read_up_to(fd: int, limit_bytes: int) -> bytes:
    """What is left of an open file, from its position on, but no more than the limit."""
    parts: list[bytes] = []
    left = limit_bytes
    while left > 0 and (part := os.read(fd, min(left, CHUNK_BYTES))):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it; write(2) may take a part, e.g. on a disk that becomes full.

    Raises:
        OSError: what is written by then stays in the file.
    """
    while data:
        data = data[os.write(fd, data) :]
