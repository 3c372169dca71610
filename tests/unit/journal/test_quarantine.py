"""Whatever a row of the journal holds, the worker starts, names what it cannot read, and goes on.

The tables and columns are those of the schema: a new one is corrupted without a change here.
"""

import asyncio
import contextlib
import copy
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from handlers.claims.orphan import Orphan
from handlers.clock import now_ms
from handlers.mechanism import Durability, StepIntent
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import EventKind
from schemas.records import InstanceRecord, NetworkRecord, Status, Tombstone
from schemas.requests import InstanceRef, SetupNetwork, StartInstance, TenantNet
from schemas.subjects import Lane
from tests.constants import NET, START, STOP
from tests.fakes.host import FakeHost, instance_file, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import reconciled, recovery
from worker.journal import schema
from worker.journal.audit import FAILED, JournalAudit
from worker.journal.migration import migrations
from worker.reconcile.sweep import HOUR_MS

REF = InstanceRef("acme", "web", "odd")
ODD = StartInstance("acme", "web", "odd")
ODD_NET = TenantNet(9, "10.240.9.0/24", "10.240.9.1", "br-tenant-9")
SLOT = 12
GARBAGE = {
    "bytes": "X'c1ff00'",
    "no UTF-8": "CAST(X'66ff' AS TEXT)",
    "a word": "'hover ing'",
    "no bytes": "X''",
    "a fraction": "1.5",
    "a negative number": "-7",
    "a huge number": "9223372036854775807",
    "nothing": "NULL",
}
RENAMED = "CAST(replace(CAST(record AS TEXT), '\"odd\"', '\"odd-K\"') AS BLOB)"
OF_A_RECORD = {
    "an unknown status": "CAST(replace(CAST(record AS TEXT), 'stopped', 'hovering') AS BLOB)",
    "half of it": "substr(record, 1, length(record) / 2)",
    "a newer field": "CAST(replace(CAST(record AS TEXT), '{', '{\"newer\":[1],') AS BLOB)",
    "another's": "CAST(replace(CAST(record AS TEXT), 'odd', 'other') AS BLOB)",
}
# The row of each table that is copied and corrupted, and what tells copy K from the others.
ODD_ROW: dict[str, tuple[str, dict[str, str]]] = {
    "command": ("id = 'odd-command'", {"n": "NULL", "id": "'odd-K'"}),
    "joiner": ("command_id = 'odd-command'", {"stream_seq": "100 + K"}),
    "retry": ("command_id = 'odd-command'", {"command_id": "'odd-K'"}),
    "step": ("command_id = 'odd-left'", {"n": "NULL", "key": "'tn9iK'"}),
    "point": ("command_id = 'odd-left'", {"name": "'odd-K'"}),
    "instance": (
        "instance_id = 'odd'",
        {
            "instance_id": "'odd-K'",
            "uid_slot": "1000 + K",
            "address_offset": "NULL",
            "record": RENAMED,
        },
    ),
    "tombstone": ("instance_id = 'odd'", {"instance_id": "'odd-K'", "record": RENAMED}),
    "network": (
        "tenant_id = 'odd'",
        {
            "tenant_id": "'odd-K'",
            "tenant_net_id": "1000 + K",
            "record": f"CAST(replace({RENAMED}, '_id\":9', '_id\":' || (1000 + K)) AS BLOB)",
        },
    ),
    "announced": ("lane = 'network.odd'", {"lane": "'network.odd-K'"}),
    "outbox": ("msg_id = 'odd-command'", {"n": "1000 + K"}),
    "audit": ("name = 'odd'", {"n": "NULL", "name": "'odd-K'"}),
    "state": ("key LIKE '%network.odd'", {"key": "'h1.network.odd-K'"}),
}


def columns() -> Iterator[tuple[str, str]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(schema.TABLES)
        migrations.apply(connection)
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            for row in connection.execute(f"PRAGMA table_info({table})"):
                yield table, row[1]


def test_every_table_of_the_schema_has_an_odd_row() -> None:
    assert {table for table, _ in columns()} - {"meta"} == ODD_ROW.keys()


def network_of_odd() -> NetworkRecord:
    return NetworkRecord(tenant_id="odd", net=ODD_NET, status="up", since_ms=1)


async def fill(worker: MemoryWorker) -> None:
    """A running instance, and beside it one row in each table."""
    journal = worker.journal
    assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
    assert (await worker.run(START)).code is Code.OK
    await journal.records.put_instance(
        InstanceRecord(ref=REF, status=Status.STOPPED, since_ms=1, uid_slot=SLOT, offset=8)
    )
    await journal.records.put_network(network_of_odd())
    await journal.steps.begin(
        "odd-left", StepIntent("tap", "tn9i8", existed=False, durability=Durability.DURABLE)
    )
    await journal.steps.mark("odd-left", "odd-point")


def add_rest(path: Path) -> None:
    """What only a crash leaves: an unfinished command, its joiner, an unsent reply."""
    lane = Lane.instance(REF)
    request = codec.encode_request(ODD)
    tombstone = Tombstone(ref=REF, at_ms=1, launch=1)
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(
            "INSERT INTO command (id, lane, subject, stream_seq, kind, request, form, reply_to, "
            "received_at_ms) VALUES ('odd-command', ?, 's', 7, 'StartInstance', ?, 'named', "
            "'_INBOX.odd', 1)",
            (str(lane), request),
        )
        file.execute("INSERT INTO retry VALUES ('odd-command', 7)")
        file.execute("INSERT INTO joiner VALUES ('odd-command', 8, '_INBOX.joined')")
        file.execute(
            "INSERT INTO tombstone VALUES ('acme', 'web', 'odd', ?)",
            (msgspec.json.encode(tombstone),),
        )
        file.execute(
            "INSERT INTO audit (at_ms, actor, kind, name) VALUES (?, 'sweep', 'jails', 'odd')",
            (now_ms(),),
        )
        file.execute("DELETE FROM outbox")
        file.execute("INSERT INTO outbox VALUES (900, 'reply', 's', 'odd-command', X'7b7d', X'80')")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeHost]:
    path, machine = tmp_path_factory.mktemp("prepared") / "j", seeded()

    async def prepare() -> None:
        async with memory_worker(path, machine) as worker:
            await fill(worker)

    asyncio.run(prepare())
    add_rest(path)
    return path, machine


def corrupt_copies(path: Path) -> set[str]:
    """Copy the odd row of each table once per column and way, and corrupt that column of it.

    Returns the tables; a copy that the schema refuses is left out.
    """
    done: set[str] = set()
    number = 0
    with closing(sqlite3.connect(path)) as file, file:
        for table, (where, keys) in ODD_ROW.items():
            names = [column for each, column in columns() if each == table]
            for column in names:
                for value in (GARBAGE | (OF_A_RECORD if column == "record" else {})).values():
                    number += 1
                    made = {name: keys.get(name, name).replace("K", str(number)) for name in names}
                    made[column] = value
                    with contextlib.suppress(sqlite3.IntegrityError):  # the schema refuses it
                        copied = file.execute(
                            f"INSERT OR IGNORE INTO {table} ({', '.join(made)}) "
                            f"SELECT {', '.join(made.values())} FROM {table} WHERE {where}"
                        )
                        done |= {table} if copied.rowcount else set()
    return done


async def everything_else_goes_on(worker: MemoryWorker) -> None:
    counts = await recovery(worker).run()
    assert (counts.adopted, counts.failed) == (1, 0)
    await reconciled(worker).reconciler.once()
    assert worker.record().status is Status.RUNNING
    assert (await worker.run(SetupNetwork("acme", NET))).code is Code.OK
    assert (await worker.run(START)).code is Code.OK
    assert (await worker.run(STOP)).code is Code.OK
    assert await worker.journal.commands.prune() >= 0
    await worker.journal.outbox.rewrite_state()
    assert not worker.journal.commands.unfinished()
    await the_audit_goes_on(worker.journal.audit)


async def the_audit_goes_on(audit: JournalAudit) -> None:
    """Every row has a result, and what is removed from now on counts."""
    assert await audit.close_cut_off() == 0
    before = await audit.spent_within(HOUR_MS)
    number = await audit.begin(Orphan("jails", "next"), "sweep")
    await audit.end(number, Orphan("jails", "next"), "sweep", FAILED, "a reason")
    await audit.begin(Orphan("jails", "cut off"), "sweep")
    assert await audit.spent_within(HOUR_MS) == before + 2
    assert await audit.close_cut_off() == 1
    assert (await audit.newest())[0].name == "cut off"


async def test_corrupted_rows_are_named_and_stop_nothing_else(
    prepared: tuple[Path, FakeHost], tmp_path: Path
) -> None:
    path, machine = tmp_path / "j", copy.deepcopy(prepared[1])
    shutil.copy(prepared[0], path)
    assert corrupt_copies(path) == ODD_ROW.keys()

    async with memory_worker(path, machine) as worker:
        named = worker.journal.quarantine.counts()
        assert named.keys() == ODD_ROW.keys() - {"audit"}  # that has no lane to keep from anything
        assert len(worker.journal.quarantine.rows()) == sum(named.values())
        await everything_else_goes_on(worker)
        assert worker.journal.quarantine.counts() == named

    with closing(sqlite3.connect(path)) as file:
        for table in named.keys() - {"joiner", "retry"}:  # these go with their command
            (left,) = file.execute(f"SELECT count(*) FROM {table}").fetchone()
            assert left >= named[table]
        answered = file.execute("SELECT count(*) FROM command WHERE code = 'internal'")
        assert answered.fetchone() == (named["command"],)
        dead = file.execute("SELECT count(*) FROM outbox WHERE kind = 'dead'").fetchone()
        assert dead == (named["command"],)


@pytest.mark.parametrize("value", GARBAGE.values(), ids=GARBAGE)
async def test_corrupted_facts_of_the_journal_begin_a_new_count_of_events(
    prepared: tuple[Path, FakeHost], tmp_path: Path, value: str
) -> None:
    path, machine = tmp_path / "j", copy.deepcopy(prepared[1])
    shutil.copy(prepared[0], path)
    with closing(sqlite3.connect(path)) as file, file:
        before = dict(file.execute("SELECT key, value FROM meta"))
        file.execute(f"UPDATE OR IGNORE meta SET value = {value}")

    async with memory_worker(path, machine) as worker:
        await everything_else_goes_on(worker)
        after = worker.journal.store.journal_id

    assert (after == before["journal_id"]) == (value == "NULL")  # which the schema refuses


async def unread_instance(prepared: tuple[Path, FakeHost], path: Path) -> FakeHost:
    """A journal whose record of the odd instance is of a version that knows more statuses."""
    shutil.copy(prepared[0], path)
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("DELETE FROM command WHERE id = 'odd-command'")
        changed = OF_A_RECORD["an unknown status"]
        file.execute(f"UPDATE instance SET record = {changed} WHERE instance_id = 'odd'")
    return copy.deepcopy(prepared[1])


async def test_no_command_takes_a_record_that_cannot_be_read_for_an_absent_one(
    prepared: tuple[Path, FakeHost], tmp_path: Path
) -> None:
    machine = await unread_instance(prepared, tmp_path / "j")
    machine.files[REF] = instance_file(REF, 8)
    async with memory_worker(tmp_path / "j", machine) as worker:
        before = dict(machine.resources)
        reply = await worker.run(ODD)

        assert (reply.code, reply.detail["act"]) == (Code.HOST_FAULT, "operator")
        assert reply.detail["quarantined"] == "instance.acme.web.odd"
        assert machine.resources == before
        records = worker.journal.records
        assert records.with_slot(SLOT) == REF  # its uid goes to no other
        assert records.refers("acme/web/whatever")  # and no revision is collected
        assert (await worker.run(STOP)).code is Code.OK


async def test_what_a_command_of_it_left_behind_is_not_removed(
    prepared: tuple[Path, FakeHost], tmp_path: Path
) -> None:
    machine = await unread_instance(prepared, tmp_path / "j")
    with closing(sqlite3.connect(tmp_path / "j")) as file, file:
        file.execute(
            "INSERT INTO command (id, lane, subject, stream_seq, kind, form, received_at_ms, code, "
            "finished_at_ms) VALUES ('odd-left', 'instance.acme.web.odd', 's', 1, 'StartInstance', "
            "'named', 1, 'host_fault', 1)"
        )
    machine.resources["tap", "tn9i8"] = "maybe of the instance that cannot be read"
    async with memory_worker(tmp_path / "j", machine) as worker:
        made = reconciled(worker)
        await made.reconciler.once()
        assert ("tap", "tn9i8") in machine.resources
    with closing(sqlite3.connect(tmp_path / "j")) as file, file:
        file.execute("DELETE FROM instance WHERE instance_id = 'odd'")
    async with memory_worker(tmp_path / "j", machine) as worker:
        await reconciled(worker).reconciler.once()
        assert ("tap", "tn9i8") not in machine.resources


async def test_the_sender_of_an_unread_command_is_answered_once_and_its_request_kept(
    prepared: tuple[Path, FakeHost], tmp_path: Path
) -> None:
    path, machine = tmp_path / "j", copy.deepcopy(prepared[1])
    shutil.copy(prepared[0], path)
    request = b"\x81\xa6Evolve\x80"  # a command of a newer version
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE command SET request = ? WHERE id = 'odd-command'", (request,))

    for _start in range(2):
        async with memory_worker(path, machine) as worker:
            out = worker.journal.store.mirror.out
            replies = [row for row in out["reply"].rows.values() if row.msg_id == "odd-command"]
            direct = [row.subject for row in out["direct"].rows.values()]
            (dead,) = out["dead"].rows.values()
            found = await worker.journal.commands.result("odd-command")

        assert found is not None
        assert found.reply is not None
        reply = codec.decode_reply(found.reply)
        assert (reply.code, reply.retryable) == (Code.INTERNAL, False)
        assert (reply.request_digest, found.request_digest) == (None, None)
        assert len(replies) == 2  # the row of the fixture, and this one
        assert direct == ["_INBOX.odd", "_INBOX.joined"]
        assert dead.payload == request
        assert b"Evolve" in dead.headers or b"unreadable in the journal" in dead.headers


async def test_an_unread_command_whose_request_can_be_read_says_which_it_was(
    prepared: tuple[Path, FakeHost], tmp_path: Path
) -> None:
    path, machine = tmp_path / "j", copy.deepcopy(prepared[1])
    shutil.copy(prepared[0], path)
    request = codec.encode_request(START)
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(
            "UPDATE command SET request = ?, form = 'odd' WHERE id = 'odd-command'", (request,)
        )

    async with memory_worker(path, machine) as worker:
        found = await worker.journal.commands.result("odd-command")

    assert found is not None
    assert found.reply is not None
    reply = codec.decode_reply(found.reply)
    assert (reply.code, reply.request_digest) == (Code.INTERNAL, codec.request_digest(START))
    assert found.request_digest == reply.request_digest


async def test_a_step_of_an_unknown_mechanism_and_each_row_once_are_listed_and_announced(
    prepared: tuple[Path, FakeHost], tmp_path: Path
) -> None:
    machine = await unread_instance(prepared, tmp_path / "j")
    with closing(sqlite3.connect(tmp_path / "j")) as file, file:
        file.execute("UPDATE step SET mechanism = 'teleporter' WHERE command_id = 'odd-left'")

    async with memory_worker(tmp_path / "j", machine) as worker:
        await reconciled(worker).reconciler.once()
        quarantine = worker.journal.quarantine
        events = [
            codec.decode_event(row.payload)
            for row in worker.journal.store.mirror.out["event"].rows.values()
        ]

        assert quarantine.counts() == {"instance": 1, "step": 1}
        assert [(row.table, row.key) for row in quarantine.rows()] == [
            ("instance", "acme/web/odd"),
            ("step", "odd-left teleporter tn9i8"),
        ]
    told = [event for event in events if event.kind is EventKind.QUARANTINED]
    assert [event.detail["key"] for event in told] == ["acme/web/odd"]


@pytest.mark.parametrize("value", ["X'c1ff00'", "'a word'", str((1 << 63) - 1)])
async def test_a_damaged_time_of_a_removal_is_not_spent_for_ever(
    prepared: tuple[Path, FakeHost], tmp_path: Path, value: str
) -> None:
    path, machine = tmp_path / "j", copy.deepcopy(prepared[1])
    shutil.copy(prepared[0], path)
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(f"UPDATE audit SET at_ms = {value}")

    async with memory_worker(path, machine) as worker:
        assert await worker.journal.audit.spent_within(HOUR_MS) == 0
