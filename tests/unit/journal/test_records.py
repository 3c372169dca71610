"""Instances, networks and tombstones, and the events and state that a change publishes."""

import asyncio
import sqlite3
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from handlers.errors import Conflict
from schemas import codec
from schemas.envelopes import Event, EventKind
from schemas.records import ABSENT, NetworkRecord, Status, Tombstone
from schemas.requests import InstanceRef, SetupNetwork, TeardownNetwork
from tests.fakes.shell_worker import REF, command
from tests.unit.journal.journals import NET, accept, events, ok, opened, record
from worker.journal.journal import Journal
from worker.journal.transaction import Transaction
from worker.journal.writer import JournalFault


async def test_records_are_read_from_memory_and_kept_over_a_restart(tmp_path: Path) -> None:
    network = NetworkRecord(tenant_id="acme", net=NET, status="up", since_ms=1)
    gone = Tombstone(ref=InstanceRef("acme", "web", "old"), at_ms=1, launch=3, kept_volumes=True)
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record(uid_slot=4, offset=9, net=NET))
        await journal.records.put_network(network)
        await journal.records.put_instance(record("old"))
        await journal.records.drop_instance(gone.ref, gone)

    async with opened(tmp_path) as journal:
        assert journal.records.instance(REF) == record(uid_slot=4, offset=9, net=NET)
        assert journal.records.instances("acme") == (record(uid_slot=4, offset=9, net=NET),)
        assert journal.records.instances("other") == ()
        assert journal.records.tombstone(gone.ref) == gone
        assert journal.records.network("acme") == network
        await journal.records.put_network(replace(network, status=ABSENT))
        assert journal.records.networks() == ()


async def test_a_put_writes_an_index_only_if_slot_or_offset_change(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record(uid_slot=4, offset=9))
        frame = 4096 + 24
        log = Path(f"{journal.store.path}-wal")
        begun = log.stat().st_size

        await journal.records.put_instance(record(uid_slot=4, offset=9, launch=2))
        same = log.stat().st_size
        await journal.records.put_instance(record(uid_slot=5, offset=9, launch=2))

        assert (same - begun) // frame == 1
        assert (log.stat().st_size - same) // frame > 1
    async with opened(tmp_path) as journal:
        assert journal.records.instance(REF) == record(uid_slot=5, offset=9, launch=2)


async def test_each_status_change_is_one_event_whose_from_is_the_previous_to(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record(status=Status.STARTING, command_id="c1"))
        await journal.records.put_instance(record(status=Status.STARTING, launch=1))
        await journal.records.put_instance(
            record(status=Status.RUNNING), reason="ready", detail={"x": 1}
        )
    async with opened(tmp_path) as journal:
        await journal.records.drop_instance(REF, None)
        await journal.records.put_instance(record(status=Status.STARTING))
        told = await events(journal)

    assert [(e.seq, e.from_, e.to) for e in told] == [
        (1, None, "starting"),
        (2, "starting", "running"),
        (3, "running", "destroyed"),
        (4, "destroyed", "starting"),
    ]
    assert (told[0].command_id, told[0].id) == ("c1", f"h1:{told[0].journal_id}:1")
    assert (told[1].reason, told[1].detail, told[1].instance_id) == ("ready", {"x": 1}, "a1")


async def test_a_uid_slot_has_one_instance_and_a_conflicting_put_writes_nothing(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as journal:
        puts = [journal.records.put_instance(record(f"a{n}", uid_slot=n // 2)) for n in range(6)]
        outcomes = await asyncio.gather(*puts, return_exceptions=True)

        assert [type(o) for o in outcomes] == [type(None), Conflict] * 3
        assert [r.ref.instance_id for r in journal.records.instances()] == ["a0", "a2", "a4"]
        assert [e.seq for e in await events(journal)] == [1, 2, 3]


async def test_an_offset_is_exclusive_only_while_its_instance_lives_or_sleeps(
    tmp_path: Path,
) -> None:
    stopped = record("a1", Status.STOPPED, offset=5)
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(stopped)
        await journal.records.put_instance(record("a2", Status.SLEEPING, offset=5))
        with pytest.raises(Conflict, match="offset 5"):
            await journal.records.put_instance(replace(stopped, status=Status.STARTING, uid_slot=1))

        assert journal.records.instance(REF) == stopped


async def test_a_tenant_net_id_belongs_to_one_tenant(tmp_path: Path) -> None:
    mine = NetworkRecord(tenant_id="acme", net=NET, status="up", since_ms=1)
    async with opened(tmp_path) as journal:
        await journal.records.put_network(mine)
        with pytest.raises(Conflict, match="tenant_net_id 7"):
            await journal.records.put_network(replace(mine, tenant_id="other"))


async def test_an_expected_network_is_known_at_once_and_over_a_fault(tmp_path: Path) -> None:
    mine = NetworkRecord(tenant_id="acme", net=NET, status="up", since_ms=1)

    def fault(tx: Transaction) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    async with opened(tmp_path) as journal:
        journal.records.expect_network(mine)
        with pytest.raises(JournalFault):
            await journal.store.writer.submit(fault)
        await asyncio.wait_for(journal.store.until_writable(), 10)

        assert journal.records.networks() == (mine,)
    async with opened(tmp_path) as journal:
        assert journal.records.networks() == ()


async def test_a_networks_record_is_committed_with_the_outcome_of_its_command(
    tmp_path: Path,
) -> None:
    mine = NetworkRecord(tenant_id="acme", net=NET, status="up", since_ms=1)
    up, down = SetupNetwork("acme", NET), TeardownNetwork("acme", NET)
    async with opened(tmp_path) as journal:
        await accept(journal, command(up, "c1"))
        await journal.commands.finish(ok("c1"), codec.encode_reply(ok("c1")), network=mine)
    async with opened(tmp_path) as journal:
        assert journal.records.networks() == (mine,)
        await accept(journal, command(down, "c2"), 2)
        gone = replace(mine, status=ABSENT)
        await journal.commands.finish(ok("c2"), codec.encode_reply(ok("c2")), network=gone)
        told = await events(journal)
    async with opened(tmp_path) as journal:
        assert journal.records.networks() == ()

    assert [(e.kind, e.from_, e.to) for e in told] == [
        (EventKind.NETWORK, None, "up"),
        (EventKind.COMMAND, None, None),
        (EventKind.NETWORK, "up", ABSENT),
        (EventKind.COMMAND, None, None),
    ]


async def test_state_has_the_newest_value_of_each_key(tmp_path: Path) -> None:
    key = "h1.instance.acme.web.a1"
    async with opened(tmp_path) as journal:
        await journal.records.put_instance(record(status=Status.STARTING))
        await journal.records.put_instance(record(status=Status.RUNNING))
        (row,) = journal.outbox.dirty()
        value = msgspec.msgpack.decode(row.value or b"")
        journal.outbox.written(key, 1)

        assert (row.key, row.seq, value["status"], value["seq"]) == (key, 2, "running", 2)
        assert value["journal_id"] == journal.store.journal_id
        assert len(journal.outbox.dirty()) == 1
    async with opened(tmp_path) as journal:
        assert [r.seq for r in journal.outbox.dirty()] == [2]
        journal.outbox.written(key, 2)
    async with opened(tmp_path) as journal:
        assert journal.outbox.dirty() == ()
        await journal.outbox.rewrite_state()
        assert [r.seq for r in journal.outbox.dirty()] == [2]
        await journal.records.drop_instance(REF, None)
        assert [(r.key, r.value, r.seq) for r in journal.outbox.dirty()] == [(key, None, 3)]
        journal.outbox.written(key, 3)
    async with opened(tmp_path) as journal:
        await journal.outbox.rewrite_state()
        assert journal.outbox.dirty() == ()


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
        await journal.records.put_instance(record(f"a{n}", status, uid_slot=n))
    elif what == "clash":
        await journal.records.put_instance(record(f"a{n}", status, uid_slot=n + 1))
    elif what == "drop":
        await journal.records.drop_instance(ref, None)
    elif what == "event":
        await journal.records.event(EventKind.DRIFT, ref=ref)


def destroyed(tenant: str, number: int, *, kept: bool = False) -> Tombstone:
    ref = InstanceRef(tenant, "web", f"i-{number}")
    return Tombstone(ref=ref, at_ms=number, launch=1, kept_volumes=kept)


async def test_tombstones_are_bounded_by_age_and_count_and_a_tenants_own_go_first(
    tmp_path: Path,
) -> None:
    many = [destroyed("acme", n) for n in range(10)]
    few = [destroyed("other", n) for n in range(2)]
    kept = destroyed("acme", 100, kept=True)
    async with opened(tmp_path) as journal:
        records = journal.records
        for each in (*many, *few, kept):
            await records.drop_instance(each.ref, each)
        while await records.prune_tombstones(keep_ms=1 << 60, most=6, limit=3):
            pass

        left = [each for each in (*many, *few) if records.tombstone(each.ref)]
        assert left == [*many[6:], *few]
        while await records.prune_tombstones(most=6, limit=3):
            pass
        assert not any(records.tombstone(each.ref) for each in left)

    async with opened(tmp_path) as journal:
        assert journal.records.tombstone(kept.ref) == kept
        assert not any(journal.records.tombstone(each.ref) for each in (*many, *few))


async def test_a_tombstone_that_is_replaced_meanwhile_is_not_pruned(tmp_path: Path) -> None:
    old = destroyed("acme", 1)
    new = replace(old, launch=2, kept_volumes=True)
    async with opened(tmp_path) as journal:
        await journal.records.drop_instance(old.ref, old)
        _, pruned = await asyncio.gather(
            journal.records.drop_instance(new.ref, new), journal.records.prune_tombstones()
        )

        assert pruned == 0
        assert journal.records.tombstone(old.ref) == new
