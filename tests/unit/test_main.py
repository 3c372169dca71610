"""How a worker that cannot start ends: exit code and log event."""

import asyncio
import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.errors import Unavailable
from handlers.host.jail.layout import JailLayout, JailMetadata
from handlers.host.lock import HostLock
from handlers.host.storage.disk_space import DiskSpace
from schemas import naming
from schemas.codes import EXIT_CODES, Code
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef
from schemas.settings import HostSettings, VmmSettings
from tests.unit.journal.journals import opened
from tests.unit.test_preflight import settings_in
from worker import logs, main
from worker.main import run, versions_without_record, watch_disk
from worker.preflight import prepare_dirs


def test_a_second_worker_ends_with_the_code_of_a_conflict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_in(tmp_path)
    prepare_dirs(settings)
    logs.configure("info")

    with HostLock(settings.paths.run):
        assert run(settings) == EXIT_CODES[Code.CONFLICT]

    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["event"] == "worker.start_failed"


def test_a_host_that_is_not_fit_ends_with_the_code_of_a_fault(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)

    assert run(replace(settings, host=HostSettings(id="h1"))) == EXIT_CODES[Code.HOST_FAULT]


async def test_a_disk_that_cannot_be_looked_at_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    looked = asyncio.Event()

    class Hanging(DiskSpace):
        def check(self) -> None:
            nonlocal looks
            looks += 1
            if looks < 3:
                raise Unavailable("too many calls hang")
            loop.call_soon_threadsafe(looked.set)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(main, "DISK_CHECK_S", 0)
    disk = Hanging(state=str(tmp_path), reserve_mib=1)
    async with opened(tmp_path) as journal:
        watching = asyncio.create_task(watch_disk(disk, journal, lambda: None))
        async with asyncio.timeout(30):
            await looked.wait()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_the_version_of_a_vm_without_a_record_is_in_use(tmp_path: Path) -> None:
    settings = replace(settings_in(tmp_path), vmm=VmmSettings(jail_base=str(tmp_path / "jails")))
    ref = InstanceRef("acme", "web", "i-1")
    record = InstanceRecord(ref=ref, status=Status.RUNNING, since_ms=1, vmm_version="1.15.0")
    layout, jail_id = JailLayout(settings.jail_base), naming.jail_id(ref, 1)
    Path(layout.directory(jail_id)).mkdir(parents=True)
    layout.write_metadata(
        jail_id, JailMetadata(ref=ref, uid=1, launch=1, complete=True, record=record)
    )

    assert await versions_without_record(settings, []) == {"1.15.0"}
    assert await versions_without_record(settings, [ref]) == set()
