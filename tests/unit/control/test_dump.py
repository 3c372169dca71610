"""`GET /v1/dump`: what a command does now, who holds what, and a section that fails alone."""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import structlog

from handlers.claims.unrecorded import UnrecordedVmm, UnrecordedVmms, VmmProcess
from handlers.concurrency import Slots
from handlers.mechanism import Durability, StepIntent
from handlers.tenant_locks import TenantLocks
from schemas.settings import LimitSettings
from tests.fakes.shell_worker import FakeHandlers, ShellWorker, shell_worker, start, stop
from worker.control import dump as dump_module
from worker.control.dump import Dump
from worker.control.view import WorkerView


class Worker:
    """What a dump reads, over a worker without a host."""

    def __init__(self, shell: ShellWorker) -> None:
        self.journal, self.lanes = shell.journal, shell.lanes
        self.bus = SimpleNamespace(
            connected=False,
            trouble="no consumer",
            reconnects=2,
            permission_errors=0,
            pulls=5,
            ack_window=SimpleNamespace(stuck=False),
        )
        self.slots = Slots.of(LimitSettings())
        self.locks = TenantLocks()
        self.unrecorded = UnrecordedVmms()
        self.versions: Mapping[str, str] = {"hostd": "9.9"}
        self.vmm_versions = SimpleNamespace(summary=lambda: [{"version": "1.12.1"}])

    def facts(self) -> Mapping[str, Any]:
        return {"host_state": "ready", "boot_id": "b1", "capacity": {"instances": 0}}

    def checks(self) -> Mapping[str, bool]:
        return {"connected": False}


def dump_of(worker: Worker) -> dict[str, Any]:
    """As a client sees it."""
    state = Dump(cast("WorkerView", worker)).state()
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(state))
    return decoded


async def test_a_command_is_shown_with_the_step_that_it_is_in_and_what_waits_behind_it(
    tmp_path: Path,
) -> None:
    machine = FakeHandlers(gate=asyncio.Event())
    async with shell_worker(tmp_path / "j.db", machine=machine) as shell:
        shell.send(start(), "c1")
        await machine.at_gate.wait()
        shell.send(start(), "c2", issuer="agentd")
        while shell.journal.commands.count() < 2:
            await asyncio.sleep(0)

        found = dump_of(Worker(shell))

        running, waiting = found["commands"]["shown"]
        assert (running["id"], running["state"], running["attempts"]) == ("c1", "running", 1)
        assert [each["step"] for each in running["doing"]] == ["gate"]
        assert running["doing"][0]["since_s"] >= 0
        assert running["steps_taken"] == 1
        assert running["past_point_of_no_return"] is False
        assert (waiting["id"], waiting["state"], waiting["issuer"]) == ("c2", "waiting", "agentd")
        (lane,) = found["lanes"]["shown"]
        assert (lane["running"], lane["waiting"]) == ("c1", ["c2"])
        assert found["connections"]["bus"]["trouble"] == "no consumer"
        assert found["host"]["host_state"] == "ready"
        assert found["versions"] == {"hostd": "9.9"}
        assert found["vmm_versions"] == [{"version": "1.12.1"}]


async def test_a_superseded_command_is_shown_with_what_supersedes_it(tmp_path: Path) -> None:
    machine = FakeHandlers()
    held = asyncio.Event()

    async def hold(request: Any, steps: Any) -> None:
        await steps.act("stuck", held.wait)

    machine.behave = hold
    async with shell_worker(tmp_path / "j.db", machine=machine) as shell:
        shell.send(start(), "c1")
        while not machine.runs:
            await asyncio.sleep(0)
        shell.send(stop(), "c2")
        while shell.journal.commands.count() < 2:
            await asyncio.sleep(0)

        first, _ = dump_of(Worker(shell))["commands"]["shown"]

        assert (first["id"], first["superseded_by"]) == ("c1", "c2")
        held.set()
        await shell.lanes.idle()


async def test_vmms_without_a_record_are_shown_with_what_they_hold(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j.db") as shell:
        worker = Worker(shell)
        process = VmmProcess(77, 1, 2_000_000_009, None, "hostd/acme/0123456789ab-1", 193)
        worker.unrecorded.set([UnrecordedVmm(process, ("tn3i9",))])

        found = dump_of(worker)["unrecorded_vmms"]

    assert found == {
        "count": 1,
        "shown": [
            {
                "pid": 77,
                "uid": 2_000_000_009,
                "jail": None,
                "cgroup": "hostd/acme/0123456789ab-1",
                "mem_mib": 193,
                "taps": ["tn3i9"],
            }
        ],
        "left_out": 0,
    }


async def test_locks_and_slots_are_shown_with_who_holds_and_who_waits(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j.db") as shell:
        worker = Worker(shell)
        await worker.slots.boots.acquire("acme")
        async with worker.locks.shared("acme"):
            waiter = asyncio.create_task(_take(worker.locks, "acme"))
            await asyncio.sleep(0)

            found = dump_of(worker)

        await waiter
        held = {"tenant_id": "acme", "held": "1 times", "waiting": 1}
        assert found["locks"] == {"count": 1, "shown": [held], "left_out": 0}
        assert found["slots"]["boots"] == {
            "count": 8,
            "share": 4,
            "held": {"acme": 1},
            "waiting": 0,
        }


async def _take(locks: TenantLocks, tenant_id: str) -> None:
    async with locks.exclusive(tenant_id):
        pass


async def test_a_thread_and_a_task_that_hang_are_shown_with_where(tmp_path: Path) -> None:
    release = threading.Event()

    def hang_in_the_kernel() -> None:
        release.wait()

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    thread = threading.Thread(target=hang_in_the_kernel, name="stuck-nft")
    thread.start()
    task = asyncio.create_task(wait_for_ever(), name="stuck-task")
    await asyncio.sleep(0)
    async with shell_worker(tmp_path / "j.db") as shell:
        found = dump_of(Worker(shell))
    release.set()
    thread.join()
    task.cancel()

    (at,) = [each["at"] for each in found["threads"] if each["name"] == "stuck-nft"]
    assert any("hang_in_the_kernel" in frame for frame in at)
    (at,) = [each["at"] for each in found["tasks"]["shown"] if each["name"] == "stuck-task"]
    assert "Event.wait" in at[0]
    assert "wait_for_ever" in at[1]


async def test_a_section_that_fails_holds_its_error_and_leaves_the_others(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j.db") as shell:
        worker = Worker(shell)
        del worker.slots
        with structlog.testing.capture_logs() as logged:
            found = dump_of(worker)

    assert "AttributeError" in found["slots"]["error"]
    assert found["commands"] == {"count": 0, "shown": [], "left_out": 0}
    assert [line["event"] for line in logged] == ["dump.section_failed"]


async def test_what_tenants_can_make_long_is_cut_and_running_commands_come_first(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(dump_module, "SHOWN", 2)
    machine = FakeHandlers(gate=asyncio.Event())
    async with shell_worker(tmp_path / "j.db", machine=machine, run=False) as shell:
        for n in range(3):
            shell.send(start("a1"), f"c{n}")
        while shell.journal.commands.count() < 3:
            await asyncio.sleep(0)
        shell.send(start("a2"), "last")
        while shell.journal.commands.count() < 4:
            await asyncio.sleep(0)
        shell.lanes.start()
        while len(machine.runs) < 2:
            await asyncio.sleep(0)

        found = dump_of(Worker(shell))

    assert (found["commands"]["count"], found["commands"]["left_out"]) == (4, 2)
    assert {each["id"] for each in found["commands"]["shown"]} == {"c0", "last"}


async def test_what_was_left_behind_is_cut_too(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dump_module, "SHOWN", 2)
    async with shell_worker(tmp_path / "j.db") as shell:
        for command_id in ("c1", "c2", "c3"):
            key = f"of-{command_id}"
            intent = StepIntent("tap", key, existed=False, durability=Durability.VOLATILE)
            await shell.journal.steps.begin(command_id, intent)

        found = dump_of(Worker(shell))["left_behind"]

    assert (found["count"], found["left_out"]) == (3, 1)
    assert found["shown"] == [
        {"command_id": each, "step": "tap", "key": f"of-{each}"} for each in ("c1", "c2")
    ]
