"""Why a VMM that ended during its launch did so: in the failure, and whose fault it is."""

import asyncio
import signal
from pathlib import Path

import pytest

from handlers.errors import HostFault, Unavailable
from handlers.vmm_ends import ExitStatus, OomCounts
from schemas.envelopes import Reply
from schemas.requests import Request
from tests.constants import SLEEP, START, WAKE
from tests.fakes.host import Gate, seeded
from tests.fakes.memory_worker import memory_worker
from tests.unit.instance.pairs import UP

KILLED = ExitStatus(signal=signal.SIGKILL)


async def ended(
    path: Path, status: ExitStatus, *, oom: OomCounts | None = None, wake: bool = False
) -> Reply:
    """The reply to a launch whose VMM ends in a step that then fails by the host's fault."""
    machine = seeded()
    before: tuple[Request, ...] = (UP, START, SLEEP) if wake else (UP,)
    async with memory_worker(path, machine) as worker:
        for request in before:
            await worker.run(request)
        gate = machine.gates["check_confinement"] = Gate()
        machine.fail["check_confinement"] = HostFault("the VMM has no uid")
        command_id = await worker.send(WAKE if wake else START)
        await asyncio.wait_for(gate.reached.wait(), 10)
        record = worker.record()
        if oom is not None:
            machine.oom[record.cgroup_key] = oom
        machine.kill(record.jail_id, status)
        gate.opened.set()
        return await worker.reply(command_id)


@pytest.mark.parametrize("wake", [False, True])
async def test_a_kill_from_outside_is_unavailable_and_not_the_hosts_fault(
    tmp_path: Path, wake: bool
) -> None:
    reply = await ended(tmp_path / "j", KILLED, wake=wake)

    assert (reply.code.value, reply.detail["act"]) == ("unavailable", "sender")
    assert getattr(reply.response, "message", "").endswith(": killed by SIGKILL")
    assert reply.detail["vmm_end"]["reason"] == "signal_9"
    assert reply.detail["vmm_end"]["launch"] == (2 if wake else 1)


@pytest.mark.parametrize(
    ("status", "oom", "reason"),
    [
        (KILLED, OomCounts(1, 1), "oom_cgroup"),
        (KILLED, OomCounts(0, 1), "oom_host"),
        (ExitStatus(code=148), None, "signal_31"),
        (ExitStatus(), None, "unknown"),
    ],
)
async def test_any_other_end_keeps_the_failure_and_says_why(
    tmp_path: Path, status: ExitStatus, oom: OomCounts | None, reason: str
) -> None:
    reply = await ended(tmp_path / "j", status, oom=oom)

    assert (reply.code.value, reply.detail["vmm_end"]["reason"]) == ("host_fault", reason)
    assert reply.detail["vmm_end"]["text"] in getattr(reply.response, "message", "")


async def test_an_agent_that_fails_because_its_vmm_ends_is_not_asked_again(tmp_path: Path) -> None:
    """A VMM that is killed closes its sockets first: the agent fails before the VMM has exited."""
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await worker.run(UP)
        gate = machine.gates["wait_exit"] = Gate()
        machine.fail["wait_agent"] = Unavailable("connection refused")
        command_id = await worker.send(START)
        await asyncio.wait_for(gate.reached.wait(), 10)
        machine.kill(worker.record().jail_id, KILLED)
        gate.opened.set()
        reply = await worker.reply(command_id)

    assert (reply.code.value, reply.detail["act"], reply.attempts) == ("unavailable", "sender", 1)
    message = getattr(reply.response, "message", "")
    assert message.endswith("VMM exited before its guest agent answered: killed by SIGKILL")
    assert reply.detail["vmm_end"]["reason"] == "signal_9"
