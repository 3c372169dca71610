"""One commit of the journal as its parts see it, and the rows that it can queue."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class OutRow:
    """One message to send. `kind`: reply, direct (to a `reply_to`), dead, event."""

    n: int
    kind: str
    subject: str
    msg_id: str
    headers: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class StateRow:
    """The newest value of one key of the state bucket; None: the key is to go."""

    key: str
    value: bytes | None
    seq: int


@dataclass(slots=True)
class Transaction:
    """What one commit does. `seq`, `n`: of the last event and outbox row; `out`, `states`: new.

    `at_ms` is the last event's time: later ones are never told as earlier.
    """

    connection: sqlite3.Connection
    seq: int
    n: int
    at_ms: int = 0
    out: list[OutRow] = field(default_factory=list[OutRow])
    states: list[StateRow] = field(default_factory=list[StateRow])

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, values)
