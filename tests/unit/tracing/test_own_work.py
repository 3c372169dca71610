"""Spans of what no command asked for: recovery, adoption, the end of a VMM, the sweep."""

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from handlers.claims.orphan import Orphan
from handlers.errors import HostFault
from handlers.vmm_ends import ExitStatus
from schemas.codes import Code
from schemas.records import Status, VmmIdentity
from schemas.requests import SetupNetwork
from schemas.settings import SweepSettings
from schemas.subjects import Lane
from tests.constants import NET, REF, START, STOP
from tests.fakes.host import FakeHost, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import (
    FakeExits,
    FakeInventory,
    FakeJailLayout,
    reconciled,
    recovery,
    vmm_watch,
)
from tests.fakes.shell_worker import command, shell_worker, start, stop
from tests.unit.reconcile.test_vmm_watch import until
from tests.unit.tracing.test_tracing import Spans
from worker.journal.memory import CommandRow
from worker.reconcile.sweep import SIGHTINGS_S
from worker.tracing.spans import Span
from worker.tracing.tracing import LAST_MAX, Tracing

LANE = Lane.instance(REF)


async def started(worker: MemoryWorker) -> None:
    for request in (SetupNetwork("acme", NET), START):
        await worker.run(request)


class SlowExits(FakeExits):
    """No process is the VMM launched; it is known when a test says so."""

    def __init__(self, machine: FakeHost) -> None:
        super().__init__(machine)
        self.answers = asyncio.Event()

    async def watch(self, identity: VmmIdentity) -> ExitStatus:
        await self.answers.wait()
        raise HostFault("process identity mismatch")


def only(spans: Spans, name: str) -> Span:
    (span,) = spans.of(name)
    assert span.parent is None
    return span


def test_without_a_collector_nothing_is_noted() -> None:
    tracing = Tracing("h1")
    noted: list[object] = []

    assert tracing.begin(CommandRow(1, command(start()), b"", LANE, 1, 0)) is None
    with tracing.work("sweep", LANE) as facts:
        noted.append(facts)

    assert noted == [{}]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_own_work_is_sampled_by_the_ratio(ratio: float) -> None:
    spans = Spans()
    tracing = spans.tracing(ratio)

    for _ in range(2000):
        with tracing.work("sweep"):
            pass

    assert abs(len(spans) - 2000 * ratio) <= 100
    assert len({each.context.trace_id for each in spans}) == len(spans)


def test_work_that_fails_is_a_span_with_its_error() -> None:
    spans = Spans()

    with pytest.raises(HostFault), spans.tracing().work("recovery"):
        raise HostFault("no")

    assert only(spans, "recovery").error == "host_fault"


async def test_the_end_of_a_vmm_is_linked_to_the_last_command_of_its_instance(
    tmp_path: Path,
) -> None:
    machine, spans = seeded(), Spans()
    async with memory_worker(tmp_path / "j", machine, tracing=spans.tracing()) as worker:
        await started(worker)
        record = worker.record()
        watch = vmm_watch(worker)
        watch.sync_all()

        machine.kill(record.jail_id)
        await until(lambda: worker.record().status is Status.FAILED)
        await worker.lanes.idle()

    (begun,) = spans.of("StartInstance")
    span = only(spans, "vmm exited")
    assert span.links == (begun.context,)
    assert span.context.trace_id != begun.context.trace_id
    assert span.attributes["hostd.command.id"] == begun.attributes["hostd.command.id"]
    assert (span.attributes["hostd.instance.id"], span.attributes["hostd.launch"]) == ("i-1", 1)
    assert (span.attributes["hostd.vmm.end"], span.error) == ("signal_9", None)
    assert span.start_ns <= span.end_ns


async def test_a_quarantine_is_a_span(tmp_path: Path) -> None:
    machine, spans = seeded(), Spans()
    async with memory_worker(tmp_path / "j", machine, tracing=spans.tracing()) as worker:
        await started(worker)
        exits = FakeExits(machine)
        vmm = worker.record().vmm
        assert vmm is not None
        exits.strange.add(vmm.pid)

        vmm_watch(worker, exits).sync_all()
        await until(lambda: bool(spans.of("vmm quarantined")))

    assert only(spans, "vmm quarantined").attributes["hostd.tenant.id"] == "acme"


async def test_a_vmm_that_a_command_ended_has_no_span_of_its_own(tmp_path: Path) -> None:
    machine, spans = seeded(), Spans()
    async with memory_worker(tmp_path / "j", machine, tracing=spans.tracing()) as worker:
        await started(worker)
        watch = vmm_watch(worker)
        for request in (STOP, START, STOP):
            record = worker.record()
            assert (await worker.run(request)).code is Code.OK
            watch.exited(record, ExitStatus(signal=9), seen=True)
            await worker.lanes.idle()

    assert spans.of("vmm exited") == []


async def test_what_a_command_ended_before_it_was_quarantined_has_no_span(tmp_path: Path) -> None:
    machine, spans = seeded(), Spans()
    async with memory_worker(tmp_path / "j", machine, tracing=spans.tracing()) as worker:
        await started(worker)
        exits = SlowExits(machine)
        watch = vmm_watch(worker, exits)
        with capture_logs() as logs:
            watch.sync_all()
            stopped = replace(worker.record(), status=Status.STOPPED)
            await worker.journal.records.put_instance(stopped, durable=True)
            exits.answers.set()
            (watched,) = watch._watched.values()
            async with asyncio.timeout(10):
                await watched.task

    assert spans.of("vmm quarantined") == []
    assert [each for each in logs if each["event"] == "vmm.quarantined"] == []


async def test_a_cleanup_that_fails_names_its_launch(tmp_path: Path) -> None:
    machine, spans = seeded(), Spans()
    async with memory_worker(tmp_path / "j", machine, tracing=spans.tracing()) as worker:
        await started(worker)
        record = worker.record()
        machine.kill(record.jail_id)
        machine.fail["remove_jail"] = HostFault("the disk does not answer")

        vmm_watch(worker).exited(record, ExitStatus(signal=9), seen=True)
        await worker.lanes.idle()

    span = only(spans, "vmm exited")
    assert (span.attributes["hostd.launch"], span.error) == (1, "host_fault")


async def test_recovery_and_each_adoption_are_spans(tmp_path: Path) -> None:
    """The commands of the worker before are not known: no link."""
    machine, spans = seeded(), Spans()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await started(worker)
    async with memory_worker(tmp_path / "j", machine, tracing=spans.tracing()) as worker:
        await recovery(worker).run()
        await worker.lanes.idle()

    found, adopted = only(spans, "recovery"), only(spans, "vmm adopted")
    assert (found.attributes["hostd.adopted"], found.attributes["hostd.failed"]) == (1, 0)
    assert (adopted.attributes["hostd.result"], adopted.links) == ("adopted", ())
    assert adopted.attributes["hostd.instance.id"] == "i-1"


@pytest.mark.parametrize("known", ["proven", "unproven", "without metadata"])
async def test_what_becomes_of_a_vmm_of_a_lost_journal_is_a_span(
    tmp_path: Path, known: str
) -> None:
    machine, spans = seeded(), Spans()
    async with memory_worker(tmp_path / "lost", machine) as worker:
        await started(worker)
        jail_id = worker.record().jail_id
    if known == "unproven":
        machine.fail["check_confinement"] = HostFault("not confined as launched")
    jails = FakeJailLayout(machine)
    if known == "without metadata":
        jails.damaged.add(jail_id)
    async with memory_worker(tmp_path / "new", machine, tracing=spans.tracing()) as worker:
        await recovery(worker, jails).run()
        await worker.lanes.idle()

    span = only(spans, "vmm adopted")
    assert span.attributes["hostd.jail"] == jail_id
    assert span.attributes["hostd.result"] == ("adopted" if known == "proven" else "quarantined")
    instance = None if known == "without metadata" else "i-1"
    assert span.attributes.get("hostd.instance.id") == instance


async def test_an_adoption_that_does_not_end_in_time_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, spans = seeded(), Spans()

    async def never(jail_id: str) -> VmmIdentity | None:
        await asyncio.Event().wait()
        return None

    async with memory_worker(tmp_path / "j", machine) as worker:
        await started(worker)
    monkeypatch.setattr("worker.reconcile.recovery.INSTANCE_DEADLINE_S", 0.0)
    async with memory_worker(tmp_path / "j", machine, tracing=spans.tracing()) as worker:
        monkeypatch.setattr(worker.host.vmms, "find", never)
        counts = await recovery(worker).run()

    assert counts.failed == 1
    assert only(spans, "vmm adopted").error == "TimeoutError"


async def test_each_pass_of_the_sweep_is_a_span_that_counts(tmp_path: Path) -> None:
    spans, jails = Spans(), ("0123456789ab-1", "0123456789ab-2")
    settings, tracing = SweepSettings(grace_s=0), spans.tracing()
    async with memory_worker(tmp_path / "j", seeded(), sweep=settings, tracing=tracing) as worker:
        made = reconciled(worker)
        made.inventory = FakeInventory(jails=jails)
        made.removal.broken.add(Orphan("jails", jails[1]))
        await made.sweep.once()
        made.now_s += SIGHTINGS_S
        await made.sweep.once()

    first, second = spans.of("sweep")
    assert first.parent is second.parent is None
    assert first.attributes == {"hostd.orphans": 2}
    assert second.attributes == {
        "hostd.orphans": 1, "hostd.orphans.removed": 1, "hostd.orphans.failed": 1,
    }  # fmt: skip


async def test_the_last_command_is_one_that_began(tmp_path: Path) -> None:
    """A link leads to no command that was refused before it began."""
    spans = Spans()
    tracing = spans.tracing()
    async with shell_worker(tmp_path / "j", tracing=tracing) as worker:
        worker.send(start(), "c1")
        assert (await worker.reply("c1")).code is Code.OK
        worker.send(stop(), "c2", deadline_ms=1)
        assert (await worker.reply("c2")).code is Code.EXPIRED
        with tracing.work("x", Lane.of_request(start())):
            pass
    assert only(spans, "x").attributes["hostd.command.id"] == "c1"


async def test_an_unsampled_command_hides_the_one_before_it(tmp_path: Path) -> None:
    spans = Spans()
    tracing = spans.tracing()
    async with shell_worker(tmp_path / "j", tracing=tracing) as worker:
        worker.send(start(), "c1")
        await worker.reply("c1")
        worker.send(stop(), "c2", traceparent=f"00-{'ab' * 16}-{'cd' * 8}-00")
        await worker.reply("c2")
        with tracing.work("x", Lane.of_request(start())):
            pass
    span = only(spans, "x")
    assert (span.links, "hostd.command.id" in span.attributes) == ((), False)


def test_the_last_command_is_known_of_so_many_lanes() -> None:
    spans = Spans()
    tracing = spans.tracing()
    lanes = [Lane.network(f"t{n}") for n in range(LAST_MAX + 1)]
    for n, lane in enumerate(lanes):
        row = CommandRow(n, command(start(), f"c{n}"), b"", lane, n, 0)
        row.trace = tracing.begin(row)
        tracing.began(row)

    for lane in (lanes[0], lanes[1], lanes[-1]):
        with tracing.work("x", lane):
            pass

    assert [len(each.links) for each in spans] == [0, 1, 1]
