"""What a worker does first, over a host in memory."""

from pathlib import Path

from schemas.codes import Code
from schemas.requests import SetupNetwork, SleepInstance, StartInstance
from tests.fakes.host import seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from worker.metrics import Metrics
from worker.reconcile.recovery import Found, Recovery
from worker.reconcile.vmm_watch import VmmWatch

UP = SetupNetwork("acme", seeded().tenants["acme"].net)
START = StartInstance("acme", "web", "i-1")
SLEEP = SleepInstance("acme", "web", "i-1", force=True)


async def recover(worker: MemoryWorker) -> Found:
    supervisor = VmmWatch(worker.host, worker.journal, worker.lanes, Metrics("0"))
    return await Recovery(worker.host, worker.journal, supervisor).run()


async def test_a_hash_that_was_cut_is_taken_by_the_next_worker_and_only_once(
    tmp_path: Path,
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        for request in (UP, START, SLEEP):
            assert (await worker.run(request)).code is Code.OK
        machine.later.clear()  # as a shutdown does

    async with memory_worker(tmp_path / "j", machine) as worker:
        await recover(worker)
        (hash_memory,) = machine.later
        await hash_memory()
        machine.later.clear()
        await recover(worker)

        assert machine.later == []
