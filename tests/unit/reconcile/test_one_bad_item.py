"""One bad row, name or errno is reported; what runs beside it goes on."""

import asyncio
import errno
import sqlite3
from pathlib import Path

import pytest

from handlers.errors import Exhausted, HostFault
from handlers.mechanism import Durability, StepIntent
from handlers.vmm_ends import ExitStatus
from schemas.codes import Code
from schemas.records import Status, VmmIdentity
from schemas.requests import SetupNetwork
from tests.constants import START
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import FakeExits, FakeJailLayout, reconciled, recovery
from tests.unit.reconcile.test_vmm_watch import started, until
from worker.metrics import Metrics
from worker.reconcile.vmm_watch import RETRY_S, VmmWatch

EMFILE = OSError(errno.EMFILE, "Too many open files")
BUG = KeyError("not foreseen")
UP = SetupNetwork("acme", seeded().tenants["acme"].net)


class FailingExits(FakeExits):
    """The first watches fail."""

    def __init__(self, machine: FakeHost, *errors: Exception) -> None:
        super().__init__(machine)
        self.errors = list(errors)

    async def watch(self, identity: VmmIdentity) -> ExitStatus:
        if self.errors:
            raise self.errors.pop(0)
        return await super().watch(identity)


@pytest.mark.parametrize("error", [EMFILE, BUG, Exhausted("no descriptor")])
async def test_a_vmm_whose_watch_fails_is_watched_again(tmp_path: Path, error: Exception) -> None:
    machine = seeded()
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async with memory_worker(tmp_path / "j", machine) as worker:
        record = await started(worker)
        exits = FailingExits(machine, error, error)
        watch = VmmWatch(
            worker.host, worker.journal, worker.lanes, Metrics("0"), exits, sleep=sleep
        )
        watch.sync_all()
        await until(lambda: bool(exits.watched))
        assert worker.record().status is Status.RUNNING

        machine.kill(record.jail_id)
        await until(lambda: worker.record().status is Status.FAILED)

        assert pauses == [RETRY_S, RETRY_S]
        await watch.close()


async def leave_behind(worker: MemoryWorker, mechanism: str, key: str) -> None:
    intent = StepIntent(mechanism, key, False, Durability.DURABLE)
    await worker.journal.steps.begin("c-of-a-newer-hostd", intent)


async def test_a_leftover_of_an_unknown_mechanism_is_kept_and_the_others_are_removed(
    tmp_path: Path,
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        machine.resources["tap", "tn3i9"] = object()
        await leave_behind(worker, "tap", "tn3i9")
        await leave_behind(worker, "volume_of_2031", "v1")
        reconciler = reconciled(worker).reconciler

        await reconciler.once()
        await reconciler.once()

        (rows,) = worker.journal.steps.leftovers().values()
        assert [row.mechanism for row in rows] == ["volume_of_2031"]
        assert ("tap", "tn3i9") not in machine.resources


@pytest.mark.parametrize("error", [EMFILE, BUG])
async def test_a_part_of_a_pass_that_fails_does_not_keep_the_others_from_running(
    tmp_path: Path, error: Exception
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await started(worker)
        machine.resources["tap", "tn3i9"] = object()
        await leave_behind(worker, "tap", "tn3i9")
        machine.fail["read_routes"] = machine.fail["ensure_bridge"] = error
        made = reconciled(worker)
        counted: list[bool] = []

        def fail() -> None:
            counted.append(True)
            raise error

        made.reconciler._bound_logs = lambda: asyncio.to_thread(fail)

        await made.reconciler.once()

        assert counted == [True]
        assert worker.journal.steps.leftovers() == {}


@pytest.mark.parametrize(
    "error", [EMFILE, BUG, HostFault("the disk does not answer"), NotADirectoryError(20, "x")]
)
async def test_a_jail_that_cannot_be_read_does_not_keep_the_worker_from_starting(
    tmp_path: Path, error: Exception
) -> None:
    class ForeignJails(FakeJailLayout):
        def list_ids(self) -> list[str]:
            return ["lost+found", "0123456789ab-x", *super().list_ids()]

        def read_metadata(self, jail_id: str) -> None:
            raise error

    machine = seeded()
    async with memory_worker(tmp_path / "lost", machine) as worker:
        await started(worker)
    async with memory_worker(tmp_path / "new", machine) as worker:
        counts = await recovery(worker, ForeignJails(machine)).run()

        assert (counts.failed, counts.adopted) == (1, 0)
        assert len(machine.guests) == 1


@pytest.mark.parametrize("error", [EMFILE, BUG])
async def test_an_unforeseen_error_of_one_instance_does_not_end_the_recovery(
    tmp_path: Path, error: Exception
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await recovery(worker).run()
        await started(worker)
    machine.reboot("00000000-0000-4000-8000-000000000002")
    machine.fail["remove_jail"] = error
    async with memory_worker(tmp_path / "j", machine) as worker:
        counts = await recovery(worker).run()

        assert counts.failed == 1


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("instance", "('t', 'p', 'i', NULL, NULL, X'80')"),
        ("instance", "('t', 'p', 'i', NULL, NULL, 7)"),
        ("tombstone", "('t', 'p', 'i', 7)"),
        ("network", "('t', 99, '[' || 'no json')"),
        ("command", ("(99, 'x', 'no lane', 's', 1, 'Kind2031', X'c1', NULL, 'named',"
         " NULL, NULL, NULL, NULL, NULL, 1, 0, NULL, NULL, NULL)")),
        ("command", ("(99, 'x', 7.5, 's', 1, 'Kind2031', 'text', NULL, X'00',"
         " 'a', 'b', NULL, NULL, NULL, 1, 0, NULL, NULL, NULL)")),
        ("command", ("(99, 'x', 'host', 's', 1, 'Grow', X'81a447726f7780', NULL, 'named',"
         " NULL, NULL, NULL, NULL, NULL, 1, 0, NULL, NULL, NULL)")),
    ],
)  # fmt: skip
async def test_a_row_that_does_not_decode_is_skipped_and_the_rest_is_loaded(
    tmp_path: Path, table: str, values: str
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await started(worker)
        path = worker.journal.store.path
    with sqlite3.connect(path) as connection:
        connection.execute(f"INSERT INTO {table} VALUES {values}")
    connection.close()

    async with memory_worker(tmp_path / "j", machine) as worker:
        counts = await recovery(worker).run()

        assert counts.adopted == 1
        assert (await worker.run(START)).code is Code.OK
