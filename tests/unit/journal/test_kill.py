"""kill -9 after each commit of a command's life: one effect and one reply all the same.

After every commit the journal's files are copied, with what the machine and the broker looked like
at that moment. A new worker on each copy must bring the command to the same end.
"""

import copy
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from schemas import codec
from schemas.codes import Code
from tests.fakes.bus import FakeBus
from tests.fakes.shell_worker import FakeHandlers, ShellWorker, Things, shell_worker, start, stop


@dataclass
class Moment:
    """Everything that survives the worker's kill."""

    directory: Path
    commands: dict[int, object]
    bus: FakeBus
    machine: FakeHandlers


def copy_bus(bus: FakeBus) -> FakeBus:
    """The broker at this moment; what was not acknowledged is delivered again."""
    twin = FakeBus(
        commands=copy.deepcopy(bus.commands), published=list(bus.published), sent=list(bus.sent)
    )
    twin._seq, twin._known = bus._seq, set(bus._known)
    twin._known_commands = set(bus._known_commands)
    twin.redeliver()
    return twin


def copy_machine(machine: FakeHandlers) -> FakeHandlers:
    things = Things(there=set(machine.things.there), made=list(machine.things.made))
    return FakeHandlers(things=things, runs=list(machine.runs))


async def record_moments(tmp_path: Path, *, msg_id: bool) -> list[Moment]:
    """Run a Start and a Stop; note each commit, and each time that the bus changed after it."""
    moments: list[Moment] = []
    path = tmp_path / "live" / "j"
    path.parent.mkdir()

    def note(worker: ShellWorker, _seconds: float) -> None:
        directory = tmp_path / f"moment{len(moments)}"
        shutil.copytree(path.parent, directory)
        moments.append(Moment(directory, {}, copy_bus(worker.bus), copy_machine(worker.machine)))

    async with shell_worker(path) as worker:
        worker.journal.store.writer._observe = partial(note, worker)
        worker.send(start(), reply_to="_INBOX.1", msg_id=msg_id)
        await worker.reply()
        worker.send(start("a2"), "c2", reply_to="_INBOX.2", msg_id=msg_id)
        worker.send(stop("a2"), "c3", msg_id=msg_id)
        await worker.reply("c2")
        await worker.reply("c3")
        await worker.bus.until_acked()
        await worker.bus.until(events=3)
        note(worker, 0.0)
    return moments


@pytest.mark.parametrize("msg_id", [False, True])
async def test_a_worker_killed_after_any_commit_finishes_each_command_once(
    tmp_path: Path, msg_id: bool
) -> None:
    moments = await record_moments(tmp_path, msg_id=msg_id)

    assert len(moments) >= 6
    for moment in moments:
        async with shell_worker(moment.directory / "j", moment.bus, moment.machine) as worker:
            worker.send(start(), reply_to="_INBOX.1", msg_id=msg_id)
            worker.send(start("a2"), "c2", reply_to="_INBOX.2", msg_id=msg_id)
            worker.send(stop("a2"), "c3", msg_id=msg_id)
            for command_id in ("c1", "c2", "c3"):
                await worker.reply(command_id)
            await worker.bus.until_acked()
            await worker.bus.until(events=3)

            assert worker.machine.things.there == {"acme/web/a1"}
            assert worker.machine.things.made.count("acme/web/a1") == 1
            assert sorted(reply.id for reply in worker.replies()) == ["c1", "c2", "c3"]
            assert {reply.code for reply in worker.replies() if reply.id != "c2"} == {Code.OK}
            assert [event.seq for event in worker.events()] == [1, 2, 3]
            kept = {reply.msg_id: reply.payload for reply in worker.bus.replies()}
            copies = set(worker.bus.sent_to("_INBOX.1"))
            assert copies <= {kept["c1"], codec.mark_replayed(kept["c1"])}
