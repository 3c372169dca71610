"""What the journal keeps, in what order it tells of it, and what it refuses."""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from handlers.errors import Conflict, HostFault
from handlers.mechanism import StepRow
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Event, Reply
from schemas.records import InstanceRecord, NetworkRecord, Status, Tombstone
from schemas.requests import InstanceRef, Ok, TenantNet
from schemas.subjects import Lane
from tests.fakes.shell_worker import REF, SUBJECTS, command, start, stop
from worker.journal import memory, store
from worker.journal.admission import RESERVED, Accepted, Found
from worker.journal.journal import Journal

NET = TenantNet(7, "10.240.7.0/24", "10.240.7.1", "br-tenant-7")


@asynccontextmanager
async def opened(path: Path, **more: Any) -> AsyncGenerator[Journal]:
    journal = await Journal.open(str(path / "journal"), subjects=SUBJECTS, boot_id="b1", **more)
    try:
        yield journal
    finally:
        await journal.close()


def record(instance: str = "a1", status: Status = Status.RUNNING, **more: Any) -> InstanceRecord:
    return InstanceRecord(
        ref=InstanceRef("acme", "web", instance), status=status, since_ms=1, **more
    )


def ok(command_id: str = "c1", **more: Any) -> Reply:
    facts: dict[str, Any] = {"received_at_ms": 1, "finished_at_ms": 2, "attempts": 1} | more
    return Reply(id=command_id, host_id="h1", response=Ok(), code=Code.OK, **facts)


async def accept(
    journal: Journal, given: Command, seq: int = 1, *, redelivered: bool = False
) -> Accepted:
    lane = Lane.of_request(given.request)
    return await journal.accept(
        given,
        lane=lane,
        subject=SUBJECTS.command(lane),
        stream_seq=seq,
        received_at_ms=1,
        redelivered=redelivered,
    )


async def events(journal: Journal) -> list[Event]:
    rows = await journal.pending("event", 10_000)
    return [codec.decode_event(row.payload) for row in rows]


# -- the file --------------------------------------------------------------------------------------


async def test_a_journal_of_a_newer_hostd_is_refused_by_name(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    with sqlite3.connect(tmp_path / "journal") as file:
        file.execute("PRAGMA user_version=99")
    file.close()

    with pytest.raises(HostFault, match=r"schema version 99.*reads up to 1"):
        async with opened(tmp_path):
            pass


@pytest.mark.parametrize("content", [b"no database, but long enough to be looked at" * 50, None])
async def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "journal"
    if content is None:
        with sqlite3.connect(path) as file:
            file.executescript("CREATE TABLE other (a); PRAGMA user_version=1;")
        file.close()
    else:
        path.write_bytes(content)

    with pytest.raises(HostFault, match="journal of hostd"):
        async with opened(tmp_path):
            pass


async def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostFault, match="missing/journal cannot be opened"):
        async with opened(tmp_path / "missing"):
            pass


async def test_the_journal_id_is_made_with_the_file_and_stays(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        first = journal.journal_id
        await journal.put_meta("boot_id", "b0")
    async with opened(tmp_path) as journal:
        assert journal.journal_id == first
        assert journal.meta("boot_id") == "b0"


async def test_a_row_that_cannot_be_read_stops_no_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.put_instance(record("a1"))
        await journal.put_instance(record("a2"))
        await accept(journal, command(start("a1"), "bad"))
        await accept(journal, command(start("a2"), "good"))
    with sqlite3.connect(tmp_path / "journal") as file:
        file.execute("UPDATE instance SET record = '{' WHERE instance_id = 'a1'")
        file.execute("UPDATE command SET request = x'c1' WHERE id = 'bad'")
    file.close()

    with structlog.testing.capture_logs() as logs:
        async with opened(tmp_path) as journal:
            assert [r.ref.instance_id for r in journal.instances()] == ["a2"]
            assert [row.id for row in journal.unfinished()] == ["good"]
    assert [entry["table"] for entry in logs] == ["command", "instance"]


# -- records ---------------------------------------------------------------------------------------


async def test_records_are_read_from_memory_and_kept_over_a_restart(tmp_path: Path) -> None:
    network = NetworkRecord(tenant_id="acme", net=NET, status="up", since_ms=1)
    gone = Tombstone(ref=InstanceRef("acme", "web", "old"), at_ms=1, launch=3, kept_volumes=True)
    async with opened(tmp_path) as journal:
        await journal.put_instance(record(uid_slot=4, offset=9, net=NET))
        await journal.put_network(network)
        await journal.put_instance(record("old"))
        await journal.drop_instance(gone.ref, gone)

    async with opened(tmp_path) as journal:
        assert journal.instance(REF) == record(uid_slot=4, offset=9, net=NET)
        assert journal.instances("acme") == (record(uid_slot=4, offset=9, net=NET),)
        assert journal.instances("other") == ()
        assert journal.tombstone(gone.ref) == gone
        assert journal.network("acme") == network
        await journal.drop_network("acme")
        assert journal.networks() == ()


async def test_each_change_of_a_status_is_one_event_from_the_last_to(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.put_instance(record(status=Status.STARTING, command_id="c1"))
        await journal.put_instance(record(status=Status.STARTING, launch=1))
        await journal.put_instance(record(status=Status.RUNNING), reason="ready", detail={"x": 1})
    async with opened(tmp_path) as journal:
        await journal.drop_instance(REF, None)
        await journal.put_instance(record(status=Status.STARTING))
        told = await events(journal)

    assert [(e.seq, e.from_, e.to) for e in told] == [
        (1, None, "starting"),
        (2, "starting", "running"),
        (3, "running", "destroyed"),
        (4, "destroyed", "starting"),
    ]
    assert (told[0].command_id, told[0].id) == ("c1", f"h1:{told[0].journal_id}:1")
    assert (told[1].reason, told[1].detail, told[1].instance_id) == ("ready", {"x": 1}, "a1")


async def test_a_uid_slot_is_one_instances_and_the_loser_writes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        puts = [journal.put_instance(record(f"a{n}", uid_slot=n // 2)) for n in range(6)]
        outcomes = await asyncio.gather(*puts, return_exceptions=True)

        assert [type(o) for o in outcomes] == [type(None), Conflict] * 3
        assert [r.ref.instance_id for r in journal.instances()] == ["a0", "a2", "a4"]
        assert [e.seq for e in await events(journal)] == [1, 2, 3]


async def test_an_offset_excludes_others_only_while_its_instance_lives_or_sleeps(
    tmp_path: Path,
) -> None:
    stopped = record("a1", Status.STOPPED, offset=5)
    async with opened(tmp_path) as journal:
        await journal.put_instance(stopped)
        await journal.put_instance(record("a2", Status.SLEEPING, offset=5))
        with pytest.raises(Conflict, match="offset 5"):
            await journal.put_instance(replace(stopped, status=Status.STARTING, uid_slot=1))

        assert journal.instance(REF) == stopped


async def test_a_tenant_net_id_is_one_tenants(tmp_path: Path) -> None:
    mine = NetworkRecord(tenant_id="acme", net=NET, status="up", since_ms=1)
    async with opened(tmp_path) as journal:
        await journal.put_network(mine)
        with pytest.raises(Conflict, match="tenant_net_id 7"):
            await journal.put_network(replace(mine, tenant_id="other"))


async def test_state_is_the_newest_value_per_key(tmp_path: Path) -> None:
    key = "h1.instance.acme.web.a1"
    async with opened(tmp_path) as journal:
        await journal.put_instance(record(status=Status.STARTING))
        await journal.put_instance(record(status=Status.RUNNING))
        (row,) = journal.dirty()
        value = msgspec.msgpack.decode(row.value or b"")
        journal.written(key, 1)

        assert (row.key, row.seq, value["status"], value["seq"]) == (key, 2, "running", 2)
        assert value["journal_id"] == journal.journal_id
        assert len(journal.dirty()) == 1
    async with opened(tmp_path) as journal:
        assert [r.seq for r in journal.dirty()] == [2]
        journal.written(key, 2)
    async with opened(tmp_path) as journal:
        assert journal.dirty() == ()
        await journal.rewrite_state()
        assert [r.seq for r in journal.dirty()] == [2]
        await journal.drop_instance(REF, None)
        assert [(r.key, r.value, r.seq) for r in journal.dirty()] == [(key, None, 3)]
        journal.written(key, 3)
    async with opened(tmp_path) as journal:
        await journal.rewrite_state()
        assert journal.dirty() == ()


Change = tuple[str, int, Status]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "drop", "event", "clash", "reopen"]),
        st.integers(0, 2),
        st.sampled_from([Status.RUNNING, Status.STOPPED, Status.SLEEPING]),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=CHANGES)
def test_seq_has_no_gaps_and_the_statuses_form_a_chain(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Change]
) -> None:
    asyncio.run(_chain(tmp_path_factory.mktemp("journal"), changes))


async def _chain(path: Path, changes: list[Change]) -> None:
    parts: list[list[Change]] = [[]]
    for change in changes:
        if change[0] == "reopen":
            parts.append([])
        parts[-1].append(change)
    told: list[Event] = []
    for part in parts:
        async with opened(path) as journal:
            calls = [_change(journal, *change) for change in part]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(r) for r in results} <= {type(None), Conflict}
            told = await events(journal)
    assert [e.seq for e in told] == list(range(1, len(told) + 1))
    last: dict[str | None, str | None] = {}
    for event in told:
        if event.kind == "status":
            assert event.from_ == last.get(event.instance_id)
            assert event.to != event.from_
            last[event.instance_id] = event.to


async def _change(journal: Journal, what: str, n: int, status: Status) -> None:
    ref = InstanceRef("acme", "web", f"a{n}")
    if what == "put":
        await journal.put_instance(record(f"a{n}", status, uid_slot=n))
    elif what == "clash":
        await journal.put_instance(record(f"a{n}", status, uid_slot=n + 1))
    elif what == "drop":
        await journal.drop_instance(ref, None)
    elif what == "event":
        await journal.event("drift", ref=ref)


# -- commands --------------------------------------------------------------------------------------


async def test_identity_is_the_id_and_the_request_whatever_the_envelope(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        first = await accept(journal, command(start(), reply_to="_INBOX.1"))
        joins = await accept(journal, command(start(), reply_to="_INBOX.2", issuer="x"), 2)
        again = await accept(journal, command(start(), reply_to="_INBOX.1"), 1, redelivered=True)
        clash = await accept(journal, command(stop(), reply_to="_INBOX.3"), 3)
        await journal.finish(ok())
        replay = await accept(journal, command(start(), deadline_ms=1), 4)
        late = await accept(journal, command(start(), reply_to="_INBOX.1"), 1, redelivered=True)
        direct = await journal.pending("direct", 10)
        (kept,) = await journal.pending("reply", 10)

    assert [a.kind for a in (first, joins, again, clash, replay, late)] == [
        Found.NEW, Found.JOINED, Found.JOINED, Found.CONFLICT, Found.REPLAY, Found.JOINED,
    ]  # fmt: skip
    assert kept.payload == codec.encode_reply(ok())
    assert (kept.msg_id, kept.subject) == ("c1", "hostd.v1.test.h1.reply.instance.acme.web.a1")
    replayed = codec.encode_reply(replace(ok(), replayed=True))
    assert replay.reply == replayed
    assert [(r.subject, r.payload) for r in direct] == [
        ("_INBOX.1", kept.payload),
        ("_INBOX.2", replayed),
    ]


async def test_a_lane_and_the_host_take_only_so_many(tmp_path: Path) -> None:
    async with opened(tmp_path, lane_depth=3, host_depth=5) as journal:
        kinds = [(await accept(journal, command(start("a"), f"a{n}"))).kind for n in range(4)]
        kinds += [(await accept(journal, command(start("b"), f"b{n}"))).kind for n in range(3)]
        known = await accept(journal, command(start("a"), "a0"), 2)
        await journal.finish(ok("a0"))
        room = await accept(journal, command(start("a"), "a9"))

    new = Found.NEW
    assert kinds == [new, new, new, Found.LANE_FULL, new, new, Found.HOST_FULL]
    assert (known.kind, room.kind) == (Found.JOINED, new)


async def test_what_is_full_still_takes_a_few_stops(tmp_path: Path) -> None:
    async with opened(tmp_path, lane_depth=2, host_depth=2) as journal:
        for n in range(2):
            await accept(journal, command(start(), f"start-{n}"))
        kinds = [
            (await accept(journal, command(stop(), f"stop-{n}"))).kind for n in range(RESERVED + 1)
        ]
        late = await accept(journal, command(start(), "late"))

    assert kinds == [Found.NEW] * RESERVED + [Found.LANE_FULL]
    assert late.kind is Found.LANE_FULL


async def test_unfinished_commands_attempts_and_steps_survive_a_restart(tmp_path: Path) -> None:
    given = command(start(), deadline_ms=5, issuer="me", traceparent="t", reply_to="_INBOX.1")
    async with opened(tmp_path) as journal:
        await accept(journal, given)
        await accept(journal, command(stop(), "c2"))
        assert journal.begin_attempt("c1") == 1
        await journal.begin("c1", "taps", "tn7i5", existed=False)
        await journal.begin("c1", "jails", "j", existed=True)
        await journal.mark("c1", "consumed")

    async with opened(tmp_path) as journal:
        assert [row.id for row in journal.unfinished()] == ["c1", "c2"]
        assert journal.unfinished()[0].command == given
        assert journal.begin_attempt("c1") == 2
        assert await journal.begin("c1", "taps", "tn7i5", existed=True) == StepRow(
            "taps", "tn7i5", existed=False
        )
        assert [row.mechanism for row in journal.rows("c1")] == ["taps", "jails"]
        assert journal.marked("c1", "consumed")
        assert not journal.marked("c1", "other")
        assert journal.lanes() == {Lane.instance(REF): 2}


async def test_an_outcome_clears_the_steps_but_for_what_is_left_behind(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await accept(journal, command(start()))
        await journal.begin("c1", "taps", "tn7i5", existed=False)
        await journal.begin("c1", "pins", "p", existed=False)
        await journal.finish(ok(left_behind=("taps tn7i5",)))
        assert [row.key for row in journal.leftovers()["c1"]] == ["tn7i5"]

    async with opened(tmp_path) as journal:
        assert [row.key for row in journal.leftovers()["c1"]] == ["tn7i5"]
        await journal.forget("c1", "taps", "tn7i5")
        assert journal.leftovers() == {}


async def test_an_outcome_is_written_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await accept(journal, command(start()))
        await asyncio.gather(journal.finish(ok()), journal.finish(ok(changed=True)))
        await journal.finish(ok(changed=True))

        (kept,) = await journal.pending("reply", 10)
        assert codec.decode_reply(kept.payload) == ok()
        assert [e.kind for e in await events(journal)] == ["command"]


async def test_result_tells_where_a_command_stands(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await accept(journal, command(start()))
        waiting = await journal.result("c1")
        journal.begin_attempt("c1")
        running = await journal.result("c1")
        await journal.finish(ok())
        done = await journal.result("c1")

        assert [s and s.state for s in (waiting, running, done)] == ["waiting", "running", "done"]
        assert done is not None
        assert done.reply == codec.encode_reply(ok())
        assert await journal.result("never") is None


async def test_done_commands_are_kept_a_day_and_pruned_in_batches(tmp_path: Path) -> None:
    now = 0
    async with opened(tmp_path, clock_ms=lambda: now) as journal:
        for n in range(5):
            await accept(journal, command(start(), f"c{n}"))
            await journal.finish(ok(f"c{n}", finished_at_ms=n))
        await accept(journal, command(start(), "open"))
        now = journal_day = 24 * 3_600_000
        assert await journal.prune() == 1
        now = journal_day + 4
        assert [await journal.prune(limit=3) for _ in range(3)] == [3, 1, 0]
        assert (await accept(journal, command(start(), "c0"))).kind is Found.NEW
        assert journal.is_unfinished("open")


# -- outbox ----------------------------------------------------------------------------------------


async def test_rows_beyond_memory_come_from_the_file_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "OUT_CACHE", 4)
    seen: list[int] = []
    async with opened(tmp_path) as journal:
        for _ in range(11):
            await journal.event("audit")
        while rows := await journal.pending("event", 3):
            seen += [codec.decode_event(row.payload).seq for row in rows]
            journal.sent(rows)
            if len(seen) in (3, 12):
                await journal.event("audit")

        assert seen == list(range(1, 14))
        assert journal.depth == 0
    async with opened(tmp_path) as journal:
        assert await journal.pending("event", 3) == []


async def test_too_much_unsent_stops_the_intake_until_a_tenth_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BACKLOG_ROWS", 10)
    told: list[bool] = []
    async with opened(tmp_path) as journal:
        journal.watch(lambda: told.append(journal.backlogged))
        for _ in range(11):
            await journal.event("audit")
        assert (journal.backlogged, told) == (True, [True])
        journal.sent(await journal.pending("event", 1))
        assert journal.backlogged
        journal.sent(await journal.pending("event", 2))
        assert (journal.backlogged, told) == (False, [True, False])
