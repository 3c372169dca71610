"""That the uids of jails are nobody else's: a user with one of them could reach into a guest.

Only local files are read. Users of a directory service are the operator's to keep apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass

PASSWD, GROUP, SUBUID, SUBGID = "/etc/passwd", "/etc/group", "/etc/subuid", "/etc/subgid"


@dataclass(frozen=True, slots=True)
class Taken:
    """Ids that somebody has: `count` of them from `first` on, as line `owner` of `file` says."""

    file: str
    owner: str
    first: int
    count: int


def find_overlap(
    base: int, count: int, *, files: tuple[str, ...] = (PASSWD, GROUP, SUBUID, SUBGID)
) -> Taken | None:
    """The first line of these files that takes an id in `base` to `base + count - 1`, or None.

    Source: passwd(5), group(5), subuid(5).
    """
    for file in files:
        for taken in _read(file):
            if taken.first < base + count and base < taken.first + taken.count:
                return taken
    return None


def _read(file: str) -> Iterator[Taken]:
    ranges = file.rpartition("/")[2].startswith("sub")
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.rstrip("\n").split(":")
                numbers = fields[1:3] if ranges else fields[2:3]
                if not numbers or not all(number.isdecimal() for number in numbers):
                    continue
                count = int(numbers[1]) if ranges and len(numbers) == 2 else 1
                yield Taken(file, fields[0], int(numbers[0]), count)
    except FileNotFoundError:
        return
