"""Rows that this version cannot read: damaged, or a newer hostd's. They are set aside, and named.

They stay in the file, for a version that understands them; nothing in memory is made of them. What
depends on one is refused or left alone: commands of its instance or network, the leftovers of such
commands, revisions of artifacts and the uid slot. Everything else goes on.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from schemas.decode_error import DecodeError
from schemas.subjects import Lane

LISTED: Final = 1_000
KEY_CHARS: Final = 200

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """`key` names the row in its table, readable; `lane` is what is refused because of it."""

    table: str
    key: str
    reason: str
    lane: Lane | None = None


@dataclass(frozen=True, slots=True)
class UnreadCommand:
    """An unfinished command that has to be answered: its row by `n`, and what can be read of it."""

    n: int
    id: str | None
    lane: Lane
    columns: Mapping[str, Any]
    reason: str


@dataclass(slots=True)
class Quarantined:
    """The rows of one reading of the file; listed up to `LISTED`, counted beyond."""

    rows: list[QuarantinedRow] = field(default_factory=list[QuarantinedRow])
    counts: Counter[str] = field(default_factory=Counter[str])
    lanes: set[Lane] = field(default_factory=set[Lane])
    commands: list[UnreadCommand] = field(default_factory=list[UnreadCommand])

    def add(self, table: str, key: object, error: object, lane: Lane | None = None) -> None:
        """Set one row aside, and log it."""
        row = QuarantinedRow(table, shown(key), shown(error), lane)
        self.counts[table] += 1
        if lane is not None:
            self.lanes.add(lane)
        if len(self.rows) < LISTED:
            self.rows.append(row)
            log.error("journal.row_quarantined", table=table, row=row.key, error=row.reason)

    @property
    def hides_records(self) -> bool:
        """Whether an instance or network may own what belongs to no record that can be read."""
        return bool(self.counts["instance"] or self.counts["network"])


def shown(value: object) -> str:
    """Of whatever a column holds: short, printable, without surrogates."""
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"[:KEY_CHARS].encode("ascii", "replace").decode()
    if isinstance(value, str) and value.isprintable() and value.isascii():
        return value[:KEY_CHARS]
    return ascii(value)[:KEY_CHARS]


def lane_of(tenant_id: object, pool_id: object = None, instance_id: object = None) -> Lane | None:
    """The lane of a record's key columns; None if they are no IDs."""
    parts = [tenant_id] if pool_id is None else [tenant_id, pool_id, instance_id]
    kind = "network" if pool_id is None else "instance"
    try:
        return Lane.parse(".".join([kind, *map(str, parts)]))
    except DecodeError:
        return None
