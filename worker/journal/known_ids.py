"""Which command IDs the journal may have: a Bloom filter in memory.

Almost every command has a new ID, and to ask the file that is a read of its index on the event
loop: locks and pages that the writer has just changed. The filter never denies an ID that was
added; one that it does not deny is looked up.
"""

import sqlite3
from typing import Final

BITS: Final = 1 << 21  # 256 KiB; with 200,000 IDs one in 100 new ones is looked up for nothing
RENEW_AT: Final = 400_000  # IDs, pruned ones included; with so many, one in 12


class KnownIds:
    """`count`: how many were added."""

    def __init__(self) -> None:
        self.bits = bytearray(BITS // 8)
        self.count = 0

    def add(self, command_id: str) -> None:
        self.count += 1
        for at in _places(command_id):
            self.bits[at >> 3] |= 1 << (at & 7)

    def may_have(self, command_id: str) -> bool:
        """False only for an ID that was not added."""
        bits = self.bits
        return all(bits[at >> 3] >> (at & 7) & 1 for at in _places(command_id))

    def merge(self, other: "KnownIds") -> None:
        """Add all that the other one has."""
        both = int.from_bytes(self.bits, "big") | int.from_bytes(other.bits, "big")
        self.bits = bytearray(both.to_bytes(BITS // 8, "big"))
        self.count += other.count


def _places(command_id: str) -> tuple[int, int, int, int]:
    """Python's hash has a key of this process: no sender can choose IDs that fill the filter."""
    number = hash(command_id)
    step, mask = number >> 32 | 1, BITS - 1
    return (
        number & mask,
        number + step & mask,
        number + 2 * step & mask,
        number + 3 * step & mask,
    )


def read_known(connection: sqlite3.Connection) -> KnownIds:
    """All IDs that the file has as of its last commit."""
    known = KnownIds()
    for (command_id,) in connection.execute("SELECT id FROM command"):
        known.add(command_id)
    return known
