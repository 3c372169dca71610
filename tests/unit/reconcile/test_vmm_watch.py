"""The end of a VMM is handled in its instance's lane, until it is."""

from pathlib import Path

import pytest

from handlers.errors import HostFault
from schemas.codes import Code
from schemas.records import Status
from schemas.requests import SetupNetwork, StartInstance
from tests.fakes.host import seeded
from tests.fakes.memory_worker import REF, memory_worker
from worker.metrics import Metrics
from worker.reconcile import vmm_watch as module
from worker.reconcile.vmm_watch import VmmWatch

UP = SetupNetwork("acme", seeded().tenants["acme"].net)
START = StartInstance(REF.tenant_id, REF.pool_id, REF.instance_id)


async def test_an_end_that_could_not_be_cleaned_up_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START):
            assert (await worker.run(request)).code is Code.OK
        supervisor = VmmWatch(worker.host, worker.journal, worker.lanes, Metrics("0"))
        record = worker.record()
        machine.kill(record.jail_id)
        machine.fail["remove_jail"] = HostFault("the disk does not answer")

        supervisor.exited(record, "unknown")
        await worker.lanes.idle()
        assert worker.record().status is Status.RUNNING
        machine.fail.clear()
        (again,) = supervisor._tasks.values()
        await again
        await worker.lanes.idle()

        assert worker.record().status is Status.FAILED
        await supervisor.close()
