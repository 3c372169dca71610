"""Runs two commands of which the second arrives at a chosen moment of the first.

A moment is `waits` (the lane is busy, the first command has not begun), a failpoint of a step
(`before:tap`, `after:tap`), or a wait for the guest (`in:drain_guest`), in which the first command
stays until the second ends that wait or the test does.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from schemas.codes import Code
from schemas.envelopes import Reply
from schemas.requests import Request, SetupNetwork, SleepInstance, TeardownNetwork
from schemas.subjects import Lane
from tests.constants import DESTROY, NAMES, NET, SLEEP, START, STOP, WAKE
from tests.fakes.host import FakeHost, Gate, seeded
from tests.fakes.memory_worker import MemoryWorker, memory_worker
from worker.lanes import MaintenanceTask

UP, DOWN = SetupNetwork("acme", NET), TeardownNetwork("acme", NET)
COMMANDS: Final[dict[str, Request]] = {
    "Start": START,
    "Stop": STOP,
    "Sleep": SLEEP,
    "Sleep, `force`": SleepInstance(*NAMES, force=True),
    "Wake": WAKE,
    "Destroy": DESTROY,
    "SetupNetwork": UP,
    "TeardownNetwork": DOWN,
}
WAITS: Final = "waits"
# The waits that only give a guest time, by command and step: where the fake host waits.
GUEST_WAITS: Final[dict[str, dict[str, str]]] = {
    "Start": {"wait_agent": "wait_agent"},
    "Stop": {"stop_vmm": "wait_exit"},
    "Sleep": {"drain_guest": "drain_guest"},
    "Wake": {"wake_agent": "wake_agent", "set_clock": "set_clock"},
}
PATIENCE_S: Final = 10
HELD_S: Final = 0.1


@dataclass
class Held:
    """A failpoint that holds the command that first reaches `moment`; `seen` are all of a run."""

    moment: str = ""
    armed: bool = False
    seen: list[str] = field(default_factory=list[str])
    gate: Gate = field(default_factory=Gate)

    async def __call__(self, moment: str) -> None:
        if not self.armed:
            return
        self.seen.append(moment)
        if moment == self.moment and not self.gate.reached.is_set():
            await self.gate.passed()


@dataclass(frozen=True)
class Ended:
    """The replies of two commands."""

    first: Reply
    second: Reply

    def text(self) -> str:
        """As the cells of docs/pairs.md say it: outcomes, and the instance's status at the end."""
        codes = f"{outcome(self.first)} · {outcome(self.second)}"
        status = self.second.status
        if self.second.code is not Code.NOT_FOUND:
            status = status or self.first.status
        return codes if status is None else f"{codes} → {status}"

    @property
    def hurried(self) -> bool:
        """Whether the first command did not wait for its guest."""
        detail = self.first.detail
        failed = detail.keys() & {"agent_failed", "clock_failed"}
        return bool(failed) or "sigkill" in detail.values() or "forced" in detail.values()


def outcome(reply: Reply) -> str:
    if reply.code is not Code.OK:
        return reply.code.value
    return "ok" if reply.changed else "unchanged"


_orders: dict[tuple[str, tuple[Request, ...]], list[str]] = {}


async def moments(first: str, before: Sequence[Request], path: Path) -> list[str]:
    """The moments of the first command, in the order of an undisturbed run, of which there is one
    for all cells that begin so."""
    if (first, tuple(before)) not in _orders:
        _orders[first, tuple(before)] = await _undisturbed(first, before, path)
    return _orders[first, tuple(before)]


async def _undisturbed(first: str, before: Sequence[Request], path: Path) -> list[str]:
    held = Held()
    async with memory_worker(path, seeded(), failpoint=held) as worker:
        await prepare(worker, before)
        held.armed = True
        await worker.run(COMMANDS[first])
    found = [WAITS]
    for moment in held.seen:
        found.append(moment)
        step = moment.removeprefix("before:")
        if step in GUEST_WAITS.get(first, {}):
            found.append(f"in:{GUEST_WAITS[first][step]}")
    return found


async def run_pair(
    first: str,
    moment: str,
    second: str,
    path: Path,
    *,
    before: Sequence[Request],
    silent: Sequence[str] = (),
) -> Ended:
    """Send the second command at the moment of the first, and let both go on.

    In the waits named by `silent`, moments, the guest does nothing before the first command ended.
    """
    machine = seeded()
    held = Held(moment)
    async with memory_worker(path, machine, failpoint=held) as worker:
        await prepare(worker, before)
        held.armed = True
        if moment == WAITS:
            lane = Lane.of_request(COMMANDS[first])
            worker.lanes.put_maintenance(lane, MaintenanceTask("hold", held.gate.passed))
        waits = [each for each in (moment, *silent) if each.startswith("in:")]
        machine.gates = {each.removeprefix("in:"): Gate() for each in waits}
        machine.exits_on_request = "wait_exit" not in machine.gates
        here = machine.gates.get(moment.removeprefix("in:"), held.gate)
        async with asyncio.timeout(PATIENCE_S):
            if moment == WAITS:
                await here.reached.wait()
            one = await worker.send(COMMANDS[first], "first")
            await here.reached.wait()
            two = await worker.send(COMMANDS[second], "second")
            if Lane.of_request(COMMANDS[first]) != Lane.of_request(COMMANDS[second]):
                await settled(worker, two)
            held.gate.opened.set()
            if silent:
                await finished(worker, one)
        give_in(machine)
        return Ended(await worker.reply(one), await worker.reply(two))


async def run_superseded(
    first: str, second: str, path: Path, *, before: Sequence[Request]
) -> tuple[Reply, bool]:
    """The first command's reply while its lane is still busy with something else, and whether it
    is; for a second command that supersedes it while it waits."""
    async with memory_worker(path, seeded()) as worker:
        await prepare(worker, before)
        hold = Gate()
        lane = Lane.of_request(COMMANDS[first])
        worker.lanes.put_maintenance(lane, MaintenanceTask("hold", hold.passed))
        one = await worker.send(COMMANDS[first], "first")
        two = await worker.send(COMMANDS[second], "second")
        async with asyncio.timeout(PATIENCE_S):
            await finished(worker, one)
        busy = worker.journal.commands.is_unfinished(two)
        hold.opened.set()
        return await worker.reply(one), busy


async def prepare(worker: MemoryWorker, before: Sequence[Request]) -> None:
    for request in before:
        reply = await worker.run(request)
        assert reply.code is Code.OK, (request, reply)


async def finished(worker: MemoryWorker, command_id: str) -> None:
    while worker.journal.commands.is_unfinished(command_id):
        await asyncio.sleep(0)


async def settled(worker: MemoryWorker, command_id: str) -> None:
    """Until the command of another lane has done all that it can while the first one is held."""

    def waits() -> bool:
        return any(lock._waiting for lock in worker.host.locks._locks.values())

    since_s = time.monotonic()  # another part of the first one may have the lock for a moment
    while worker.journal.commands.is_unfinished(command_id) and (
        time.monotonic() - since_s < HELD_S
    ):
        await asyncio.sleep(0)
        since_s = since_s if waits() else time.monotonic()


def give_in(machine: FakeHost) -> None:
    """The guest does what it was asked for."""
    if not machine.exits_on_request:
        for jail_id in list(machine.guests):
            machine.kill(jail_id)
    for gate in machine.gates.values():
        gate.opened.set()
    machine.exits_on_request = True
