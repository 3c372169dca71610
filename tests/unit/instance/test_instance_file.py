"""`instance.json` is best-effort: what the disk says of it fails no command and undoes no guest."""

import errno
from pathlib import Path
from typing import Any

import pytest

from handlers.errors import HostFault
from schemas.codes import Code
from schemas.records import Status
from schemas.requests import InstanceRef, Request
from tests.constants import REF, SLEEP, START, STOP, WAKE
from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from tests.unit.instance.pairs import UP
from tests.unit.instance.test_metering import run_all

EIO = OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("error", [EIO, HostFault("cannot read it")], ids=["raw", "typed"])
@pytest.mark.parametrize(("before", "request_"), [((), START), ((START, SLEEP), WAKE)])
async def test_a_file_that_cannot_be_prepared_undoes_no_guest(
    before: tuple[Request, ...],
    request_: Request,
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def prepare_update(ref: InstanceRef, changes: dict[str, Any]) -> None:
        raise error

    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, *before)
        monkeypatch.setattr(worker.host.shared, "prepare_update", prepare_update)
        reply = await worker.run(request_)

        assert (reply.code, reply.left_behind) == (Code.OK, ())
        assert worker.record().status is Status.RUNNING
        assert worker.machine.files[REF].status == "running"


@pytest.mark.parametrize(
    ("before", "request_"),
    [((), START), ((START,), STOP), ((START,), SLEEP), ((START, SLEEP), WAKE)],
)
async def test_a_file_that_cannot_be_written_is_left_behind(
    before: tuple[Request, ...], request_: Request, tmp_path: Path
) -> None:
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        await run_all(worker, UP, *before)
        worker.machine.fail["update_instance"] = EIO
        reply = await worker.run(request_)

    assert reply.code is Code.OK
    assert reply.left_behind == (f"instance.json {REF}: Input/output error",)
