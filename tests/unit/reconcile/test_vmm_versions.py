"""Versions of Firecracker in use and on the host: what does not fit together is announced once."""

import sqlite3
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from pathlib import Path

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from handlers.errors import HostFault, Unavailable
from handlers.host.vmm.binaries import VmmBinaries
from handlers.specs import VersionState
from schemas import codec
from schemas.codes import Code
from schemas.requests import InstanceRef, Request, SetupNetwork
from schemas.settings import Settings, VmmSettings
from tests.constants import NET, REF, SLEEP, START, STOP
from tests.fakes.host import seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from tests.fakes.reconcile import recovery
from worker.reconcile.vmm_versions import VmmVersions, in_use, record_version

UP = SetupNetwork("acme", NET)
ASLEEP, RUNNING = (UP, START, SLEEP), (UP, START)


class Binaries:
    """`here` is the state of each version that is on the host."""

    def __init__(self, **here: str) -> None:
        self.here = {name.replace("_", "."): state for name, state in here.items()}
        self.asked: set[str] = set()

    async def look(self) -> None:
        """`here` is what was seen."""

    def states(self, counts: Mapping[tuple[str, str], int]) -> list[VersionState]:
        return [
            VersionState(
                version=version,
                state=self.here.get(version, "missing"),
                starts=False,
                running=counts.get((version, "running"), 0),
                sleeping=counts.get((version, "sleeping"), 0),
                reason=None,
                sha256={"firecracker": "00"},
                lacks=("much",),
            )
            for version in sorted({*self.here, *(each for each, _ in counts)})
        ]

    async def read(self, vmm: VmmSettings, in_use: Collection[str]) -> Callable[[], None]:
        self.asked = set(in_use)
        return lambda: None


async def nothing_published(known: Collection[InstanceRef]) -> Collection[str]:
    return ()


async def prepared(worker: MemoryWorker, requests: tuple[Request, ...]) -> None:
    for each in requests:
        assert (await worker.run(each)).code is Code.OK


async def told(worker: MemoryWorker) -> list[str | None]:
    rows = await worker.journal.outbox.pending("event", 1000)
    found = [codec.decode_event(row.payload) for row in rows]
    return [each.reason for each in found if each.kind == "vmm_versions"]


@pytest.mark.parametrize("state", ["removed", "missing", "changed"])
@pytest.mark.parametrize("requests", [ASLEEP, RUNNING], ids=["sleeping", "running"])
async def test_a_version_in_use_that_goes_is_announced_once_and_when_it_is_back(
    tmp_path: Path, state: str, requests: tuple[Request, ...]
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await prepared(worker, requests)
        binaries, changes = Binaries(**{"1_12_1": "installed"}), list[bool]()
        versions = VmmVersions(
            binaries, worker.journal, lambda: changes.append(True), nothing_published
        )
        await versions.check()
        assert (await told(worker), dict(versions.trouble)) == ([], {})

        binaries.here = {} if state == "missing" else {"1.12.1": state}
        await versions.check()
        await versions.check()

        assert dict(versions.trouble) == {"1.12.1": state}
        assert await told(worker) == [f"Firecracker 1.12.1 is {state}"]
        binaries.here = {"1.12.1": "installed"}
        await versions.check()
        assert (await told(worker))[1:] == ["all versions of Firecracker in use are installed"]
        assert len(changes) == 2
        assert not versions.trouble


async def test_a_version_that_nothing_uses_may_go(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await prepared(worker, (*RUNNING, STOP))
        binaries = Binaries(**{"1_12_1": "removed", "1_13_0": "refused"})
        versions = VmmVersions(binaries, worker.journal, lambda: None, nothing_published)

        await versions.check()

        assert await told(worker) == []


async def test_copies_of_what_is_in_use_are_asked_for_when_files_are_read(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await prepared(worker, ASLEEP)
        binaries = Binaries()

        await VmmVersions(binaries, worker.journal, lambda: None, nothing_published).reread(
            VmmSettings()
        )

        assert binaries.asked == {"1.12.1"}


@pytest.mark.parametrize("one_pair", [False, True])
@pytest.mark.parametrize("requests", [ASLEEP, RUNNING], ids=["sleeping", "running"])
async def test_where_an_upgrade_replaces_the_files_running_vms_do_not_need_the_old_ones(
    tmp_path: Path, requests: tuple[Request, ...], *, one_pair: bool
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await prepared(worker, requests)
        counts = worker.journal.records.vmm_versions()
        vmm = VmmSettings(versions_dir="" if one_pair else "/versions")

        (here, old) = (*VmmBinaries(Settings(vmm=vmm)).states(counts),)

        assert (here.state, old.version, old.state) == ("unknown", "1.12.1", "missing")
        assert old.in_trouble == (requests is ASLEEP or not one_pair)


async def test_files_are_read_again_only_for_a_launch(tmp_path: Path) -> None:
    vmm = VmmSettings(firecracker=str(tmp_path / "firecracker"), jailer=str(tmp_path / "jailer"))
    binaries = VmmBinaries(Settings(vmm=vmm))

    seen = await binaries.version_for(None, reread=False)
    with pytest.raises(HostFault):  # there are none any more
        await binaries.version_for(None)

    assert seen == binaries.pair("").text


async def test_what_sleeps_without_a_record_keeps_its_version(tmp_path: Path) -> None:
    async def published(known: Collection[InstanceRef]) -> Collection[str]:
        return {"1.15.1", "1.13.0"} if REF in known else {"1.14.0"}

    async with memory_worker(tmp_path / "j", seeded()) as worker:
        assert await in_use(worker.journal, published) == {"1.14.0"}  # as when it was lost
        await prepared(worker, ASLEEP)
        assert await in_use(worker.journal, published) == {"1.12.1", "1.15.1", "1.13.0"}


@pytest.mark.parametrize("table", ["instance", "network"])
async def test_while_a_record_cannot_be_read_no_version_is_given_up(
    tmp_path: Path, table: str
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await prepared(worker, ASLEEP)
    with closing(sqlite3.connect(tmp_path / "j")) as file, file:
        assert file.execute(f"UPDATE {table} SET record = X'00'").rowcount == 1
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        binaries = Binaries()
        versions = VmmVersions(binaries, worker.journal, lambda: None, nothing_published)

        await versions.reread(VmmSettings())

        assert "" in binaries.asked


@pytest.mark.parametrize("said", ["9.9.9" + "x" * 100_000, "no version", "é" * 9])
async def test_what_a_vmm_says_of_its_version_is_written_only_if_it_is_one(
    tmp_path: Path, said: str
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepared(worker, RUNNING)
        record = replace(worker.record(), vmm_version="")
        await worker.journal.records.put_instance(record)
        machine.reported_version = said

        with suppress(HostFault):
            await record_version(record, worker.host, worker.journal)

        assert worker.record().vmm_version == ("9.9.9" if said.startswith("9") else "")


async def test_the_summary_has_what_an_operator_asks_for(tmp_path: Path) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await prepared(worker, ASLEEP)
        binaries = Binaries(**{"1_12_1": "removed"})

        (only,) = VmmVersions(binaries, worker.journal, lambda: None, nothing_published).summary()

        assert only == {
            "version": "1.12.1",
            "state": "removed",
            "reason": None,
            "starts": False,
            "running": 0,
            "sleeping": 1,
            "sha256": {"firecracker": "00"},
            "lacks": ["much"],
        }


@pytest.mark.parametrize("requests", [ASLEEP, RUNNING], ids=["sleeping", "running"])
async def test_the_version_of_an_older_record_is_found_at_the_next_start(
    tmp_path: Path, requests: tuple[Request, ...]
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepared(worker, requests)
        before = worker.record()
        await worker.journal.records.put_instance(replace(before, vmm_version=""))

    async with memory_worker(tmp_path / "j", machine) as worker:
        assert [version for version, _ in worker.journal.records.vmm_versions()] == [""]

        await recovery(worker).run()
        await worker.lanes.idle()

        assert worker.record() == before


async def test_files_that_cannot_be_looked_at_end_nothing_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang() -> None:
        raise Unavailable("too many calls hang")

    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await prepared(worker, RUNNING)
        binaries = Binaries(**{"1_12_1": "removed"})
        monkeypatch.setattr(binaries, "look", hang)
        versions = VmmVersions(binaries, worker.journal, lambda: None, nothing_published)
        with capture_logs() as logged:
            await versions.check()

        assert [line["event"] for line in logged] == ["vmm.versions_unseen"]
        assert await told(worker) == []
