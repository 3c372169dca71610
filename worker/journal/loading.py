"""Reads the whole journal into memory, row by row: what cannot be read is quarantined, not fatal.

SQLite keeps any type in any column, so each column is checked before something is made of it.
"""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import msgspec

from handlers.mechanism import StepRow
from schemas import codec, naming
from schemas.envelopes import Command, Form
from schemas.records import InstanceRecord, NetworkRecord, Tombstone
from schemas.requests import InstanceRef
from schemas.subjects import Lane
from worker.journal.memory import OUT_KINDS, READABLE, CommandRow, Mirror, OutQueue, read_out
from worker.journal.quarantined_rows import UnreadCommand, lane_of
from worker.journal.transaction import StateRow

INSTANCE: Final = msgspec.json.Decoder(InstanceRecord)
TOMBSTONE: Final = msgspec.json.Decoder(Tombstone)
NETWORK: Final = msgspec.json.Decoder(NetworkRecord)
FIRST: Final = -(1 << 63)  # below each row: those with a damaged number are sent, too
MAX: Final = 1 << 53  # of what is counted on, and sent
_KEY: Final = "tenant_id, pool_id, instance_id"


class Unreadable(Exception):
    """A column does not hold what it should."""


_Number = Annotated[int, msgspec.Meta(ge=-MAX, le=MAX)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX)]


class _CommandColumns(msgspec.Struct):
    """The columns of an unfinished command, with their types."""

    n: _Number
    id: str
    lane: str
    stream_seq: _Count
    request: bytes
    form: Form
    issued_at_ms: _Number | None
    deadline_ms: _Number | None
    reply_to: str | None
    issuer: str | None
    traceparent: str | None
    received_at_ms: _Number
    attempts: _Count


def load(connection: sqlite3.Connection) -> Mirror:
    """Read all of it."""
    mirror = Mirror()
    for key, value in connection.execute("SELECT key, value FROM meta"):
        with _quarantining(mirror, "meta", key):
            mirror.meta[_text(key)] = _text(value)
    _load_commands(connection, mirror)
    _load_steps(connection, mirror)
    _load_records(connection, mirror)
    _load_outbox(connection, mirror)
    return mirror


@contextmanager
def _quarantining(
    mirror: Mirror, table: str, key: object, lane: Lane | None = None
) -> Generator[None]:
    """Set a row aside that cannot be read, and continue with the next."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - named in log, metric and list
        mirror.quarantined.add(table, key, error, lane)


def _load_commands(connection: sqlite3.Connection, mirror: Mirror) -> None:
    cursor = connection.execute("SELECT * FROM command WHERE finished_at_ms IS NULL ORDER BY n")
    cursor.row_factory = sqlite3.Row
    for row in cursor:
        columns: dict[str, Any] = dict(row)
        try:
            mirror.add_command(_command_row(columns))
        except Exception as error:  # noqa: BLE001 - answered, and named in log, metric and list
            mirror.quarantined.add("command", columns["id"], error)
            mirror.quarantined.commands.append(_unread(columns, error))
    for command_id, spent_ms in connection.execute("SELECT command_id, spent_ms FROM retry"):
        with _quarantining(mirror, "retry", command_id):
            spent_s = max(0, _number(spent_ms)) / 1000
            if (command := mirror.commands.get(_text(command_id))) is not None:
                command.spent_s = spent_s
    for command_id, stream_seq, reply_to in connection.execute(
        "SELECT command_id, stream_seq, reply_to FROM joiner"
    ):
        with _quarantining(mirror, "joiner", command_id):
            _check_types(texts=(command_id, reply_to), numbers=(stream_seq,))


def _command_row(columns: dict[str, Any]) -> CommandRow:
    typed = msgspec.convert(columns, _CommandColumns, builtin_types=(bytes,))
    if naming.COMMAND_ID_PATTERN.fullmatch(typed.id) is None:
        raise Unreadable("id: not the ID of a command")
    parent, _, state = _text(typed.traceparent or "").partition(" ")
    command = Command(
        id=typed.id,
        request=codec.decode_request(typed.request),
        form=typed.form,
        issued_at_ms=typed.issued_at_ms,
        deadline_ms=typed.deadline_ms,
        reply_to=None if typed.reply_to is None else _text(typed.reply_to),
        issuer=None if typed.issuer is None else _text(typed.issuer),
        traceparent=parent or None,
        tracestate=state or None,
    )
    lane = Lane.parse(typed.lane)
    if lane != Lane.of_request(command.request):
        raise Unreadable("lane: not that of the request")
    return CommandRow(
        n=typed.n,
        command=command,
        request=typed.request,
        lane=lane,
        stream_seq=typed.stream_seq,
        received_at_ms=typed.received_at_ms,
        attempts=typed.attempts,
    )


def _unread(columns: dict[str, Any], error: Exception) -> UnreadCommand:
    """What can be read of it all the same."""
    given = columns["id"]
    known = isinstance(given, str) and naming.COMMAND_ID_PATTERN.fullmatch(given) is not None
    try:
        lane = Lane.parse(_text(columns["lane"]))
    except Exception:  # noqa: BLE001 - it is answered in the host's
        lane = Lane.host()
    return UnreadCommand(columns["n"], given if known else None, lane, columns, str(error))


def _load_steps(connection: sqlite3.Connection, mirror: Mirror) -> None:
    for command_id, mechanism, key, existed in connection.execute(
        "SELECT command_id, mechanism, key, existed FROM step ORDER BY n"
    ):
        with _quarantining(mirror, "step", f"{command_id} {mechanism} {key}"):
            row = StepRow(_text(mechanism), _text(key), bool(_number(existed)))
            mirror.steps.setdefault(_text(command_id), {})[row.mechanism, row.key] = row
    for command_id, name in connection.execute("SELECT command_id, name FROM point"):
        with _quarantining(mirror, "point", f"{command_id} {name}"):
            mirror.points.setdefault(_text(command_id), set()).add(_text(name))
    for lane, status in connection.execute("SELECT lane, status FROM announced"):
        with _quarantining(mirror, "announced", lane):
            _check_types(texts=(lane, status))


def _load_records(connection: sqlite3.Connection, mirror: Mirror) -> None:
    columns = f"{_KEY}, uid_slot, address_offset, record"
    for *key, slot, offset, packed in connection.execute(f"SELECT {columns} FROM instance"):  # noqa: S608
        lane = lane_of(*key)
        with _quarantining(mirror, "instance", "/".join(map(str, key)), lane):
            record = INSTANCE.decode(packed)
            _same_key(record.ref, key)
            if slot is not None:
                _number(slot)
            if offset is not None:
                _number(offset)
            mirror.instances.put(record)
            continue
        if isinstance(slot, int) and 0 <= slot <= MAX:
            mirror.instances.set_aside(slot, None if lane is None else lane.ref)
        else:
            mirror.instances.set_aside(None, None)
    for *key, packed in connection.execute(f"SELECT {_KEY}, record FROM tombstone"):  # noqa: S608
        with _quarantining(mirror, "tombstone", "/".join(map(str, key))):
            tombstone = TOMBSTONE.decode(packed)
            _same_key(tombstone.ref, key)
            mirror.tombstones.put(tombstone)
    for tenant_id, net_id, packed in connection.execute(
        "SELECT tenant_id, tenant_net_id, record FROM network"
    ):
        with _quarantining(mirror, "network", tenant_id, lane_of(tenant_id)):
            network = NETWORK.decode(packed)
            if (network.tenant_id, network.net.tenant_net_id) != (tenant_id, net_id):
                raise Unreadable("record: not that of its key")
            mirror.networks.put(network)


def _load_outbox(connection: sqlite3.Connection, mirror: Mirror) -> None:
    for kind in OUT_KINDS:
        queue = mirror.out[kind] = OutQueue()
        (queue.count,) = connection.execute(
            f"SELECT count(*) FROM outbox WHERE kind = ? AND {READABLE}",  # noqa: S608
            (kind,),
        ).fetchone()
        queue.refill(read_out(connection, kind, after=FIRST))
    known = ", ".join(f"'{kind}'" for kind in OUT_KINDS)
    for n, kind in connection.execute(
        f"SELECT n, kind FROM outbox WHERE kind NOT IN ({known}) OR NOT ({READABLE})"  # noqa: S608
    ):
        with _quarantining(mirror, "outbox", f"{n} {kind}"):
            raise Unreadable("a kind or a column of it")
    for key, value, seq, dirty in connection.execute("SELECT key, value, seq, dirty FROM state"):
        with _quarantining(mirror, "state", key):
            state = state_row(key, value, seq)
            if _number(dirty):
                mirror.states[state.key] = state


def state_row(key: object, value: object, seq: object) -> StateRow:
    """Raises Unreadable: a column does not hold what it should."""
    text = _text(key)
    if text.isspace() or not text.isascii() or not text.isprintable() or " " in text:
        raise Unreadable("key: not one of the bucket")
    if value is not None and not isinstance(value, bytes):
        raise Unreadable("value: not bytes")
    return StateRow(text, value, _number(seq))


def _same_key(ref: InstanceRef, key: list[Any]) -> None:
    if [ref.tenant_id, ref.pool_id, ref.instance_id] != key:
        raise Unreadable("record: not that of its key")


def _check_types(*, texts: tuple[object, ...], numbers: tuple[object, ...] = ()) -> None:
    for text in texts:
        _text(text)
    for number in numbers:
        _number(number)


def _text(value: object) -> str:
    """A text that can be written to UTF-8 again."""
    if not isinstance(value, str):
        raise Unreadable(f"expected text, found {type(value).__name__}")
    value.encode()
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or not -MAX <= value <= MAX:
        raise Unreadable(f"expected a number, found {type(value).__name__}")
    return value
