"""No command costs more on a host with more instances, tenants and networks.

What is counted is executed lines, not time: a scan of all instances or networks adds one for each.
"""

import asyncio
import gc
import sqlite3
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeVar

import pytest

from handlers.host.net.kept_routes import RouteIndex
from handlers.host.net.nft.nftables import SetContent
from handlers.host.net.rtnetlink_reader import Route
from schemas.codes import Code
from schemas.records import InstanceRecord, NetworkRecord
from tests.fakes.crowded import crowd
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import vmm_watch
from tests.lines import Lines
from tests.unit.instance.test_commands import COMMANDS, prepare
from worker.journal import schema
from worker.journal.instances import Instances
from worker.journal.networks import Networks

Kept = TypeVar("Kept")
INSTANCES, TENANTS = 2000, 500
SPREAD = 50  # of two equal runs: how the commits of the journal fall together differs
ALL_UNFINISHED = "finished_at_ms IS NULL AND 1"
NO_OPS = ("SetupNetwork", "StartInstance", "StopInstance")


def big_host() -> FakeHost:
    machine = seeded()
    machine.memory_mib = 1 << 30
    machine.cpus = 1024
    return machine


async def lines_of(kind: str, path: Path, *, crowded: bool, again: bool) -> int:
    """Executed by one command, or by the same one sent again, which changes nothing."""
    async with memory_worker(path, big_host()) as worker:
        await crowd(worker.journal, *((INSTANCES, TENANTS) if crowded else (1, 1)))
        worker.runner.after = vmm_watch(worker).sync
        await prepare(worker, kind)
        if again:
            await ok(worker, kind)
        await asyncio.sleep(0)
        gc.collect()  # the tasks that filled the journal
        lines = Lines()
        with lines.counted():
            await ok(worker, kind)
        return lines.count


async def ok(worker: MemoryWorker, kind: str) -> None:
    reply = await worker.run(COMMANDS[kind])
    assert reply.code is Code.OK, reply


@pytest.mark.parametrize(
    ("kind", "again"),
    [*((kind, False) for kind in COMMANDS), *((kind, True) for kind in NO_OPS)],
)
async def test_a_command_executes_as_much_on_a_crowded_host(
    kind: str, again: bool, tmp_path: Path
) -> None:
    small = await lines_of(kind, tmp_path / "small", crowded=False, again=again)
    large = await lines_of(kind, tmp_path / "large", crowded=True, again=again)

    assert large < small + SPREAD, (small, large)


@pytest.mark.parametrize("kind", COMMANDS)
async def test_a_command_asks_for_no_list_of_all(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> list[InstanceRecord | NetworkRecord]:
        raise AssertionError("a command lists everything")

    async with memory_worker(tmp_path / "j", big_host()) as worker:
        worker.runner.after = vmm_watch(worker).sync
        await prepare(worker, kind)
        monkeypatch.setattr(Instances, "all", refuse)
        monkeypatch.setattr(Networks, "all", refuse)

        await ok(worker, kind)


async def test_every_statement_of_a_command_uses_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements: set[str] = set()

    def opened(path: str) -> sqlite3.Connection:
        connection = open_file(path)
        connection.set_trace_callback(statements.add)
        return connection

    def read(path: str) -> sqlite3.Connection:
        connection = open_reader(path)
        connection.set_trace_callback(statements.add)
        return connection

    open_file, open_reader = schema.open_file, schema.open_reader
    monkeypatch.setattr(schema, "open_file", opened)
    monkeypatch.setattr(schema, "open_reader", read)
    path = tmp_path / "j"
    async with memory_worker(path, big_host()) as worker:
        statements.clear()  # those that fill the memory at start
        for request in COMMANDS.values():
            command_id = await worker.send(request)
            await worker.send(request, command_id)
            await worker.reply(command_id)
            await worker.send(request, command_id)

    with sqlite3.connect(path) as connection:
        plans = {each: plan_of(connection, each) for each in statements if is_query(each)}
    assert len(plans) > 20
    scans = {sql: plan for sql, plan in plans.items() if any("SCAN" in step for step in plan)}
    # The limit of the host bounds how many it counts: those that have no outcome.
    assert {sql for sql in scans if ALL_UNFINISHED not in sql} == set()


def is_query(statement: str) -> bool:
    return statement.split(maxsplit=1)[0] in {"SELECT", "INSERT", "UPDATE", "DELETE"}


def plan_of(connection: sqlite3.Connection, statement: str) -> list[str]:
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]


# -- what mechanisms keep in memory ----------------------------------------------------------------


def tap(number: int) -> str:
    return f"tn{number}i5"


def pins(count: int) -> SetContent:
    return SetContent((tap(number), "02:fc:00:00:00:05", "10.0.0.5") for number in range(count))


def route(number: int) -> Route:
    return Route(f"10.{number // 250}.{number % 250}.0/24", 254, (number,))


def routes(count: int) -> RouteIndex:
    index = RouteIndex()
    for number in range(count):
        index.add(route(number))
    return index


PIN = (tap(1), "02:fc:00:00:00:06", "10.0.0.6")
OF_PINS: dict[str, Callable[[SetContent], object]] = {
    "of": lambda kept: kept.of(tap(1)),
    "beginning": lambda kept: kept.beginning("tn0i"),
    "beginning, none": lambda kept: kept.beginning("tn77777i"),
    "add": lambda kept: kept.add(PIN),
    "discard": lambda kept: kept.discard(PIN),
}
OF_ROUTES: dict[str, Callable[[RouteIndex], object]] = {
    "overlapping": lambda kept: list(kept.overlapping(IPv4Network("10.0.1.0/24"))),
    "overlapping, none": lambda kept: list(kept.overlapping(IPv4Network("10.250.0.0/24"))),
    "of a link": lambda kept: kept.of_link_alone(1),
    "discard": lambda kept: kept.discard(route(1)),
    "add": lambda kept: kept.add(route(1)),
}


@pytest.mark.parametrize("call", OF_PINS)
def test_what_is_kept_of_a_set_is_not_walked(call: str) -> None:
    large, small = lines_on(pins(INSTANCES), OF_PINS[call]), lines_on(pins(2), OF_PINS[call])

    assert large < small + SPREAD, (small, large)


@pytest.mark.parametrize("call", OF_ROUTES)
def test_kept_routes_are_not_walked(call: str) -> None:
    large, small = (
        lines_on(routes(INSTANCES), OF_ROUTES[call]),
        lines_on(routes(2), OF_ROUTES[call]),
    )

    assert large < small + SPREAD, (small, large)


def lines_on(kept: Kept, call: Callable[[Kept], object]) -> int:
    lines = Lines()
    with lines.counted():
        call(kept)
    return lines.count
