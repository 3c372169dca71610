"""The order of a launch: what runs side by side, what waits for what, and a kill in between."""

import asyncio
from pathlib import Path

import pytest

from schemas.codes import Code
from schemas.requests import Error
from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from tests.unit.instance.test_commands import (
    COMMANDS,
    prepare,
    shape,
    status_of,
    undisturbed,
)

# One branch is held at a moment until the other is past another, then the worker is killed.
PORT = ("before:pin", "after:pin", "before:tap", "after:tap")
FILES = {
    "StartInstance": ("before:cgroup", "after:cgroup", "after:data_disk", "before:jail"),
    "WakeInstance": ("before:cgroup", "after:cgroup", "after:snapshot_use", "before:jail"),
}
VMM = {
    "StartInstance": ("after:jail", "before:vmm", "after:vmm"),
    "WakeInstance": ("before:vmm", "after:vmm", "before:link_snapshot", "after:link_snapshot"),
}
CUTS = [
    *((kind, held, at) for kind, at_ in VMM.items() for held in PORT for at in at_),
    *((kind, held, at) for kind, held_ in FILES.items() for held in held_ for at in PORT),
    # What needs no row is done beside the commit of the rows.
    *(
        (kind, *cut)
        for kind, moment in (
            ("StartInstance", "flush_conntrack"),
            ("WakeInstance", "verify_snapshot"),
        )
        for cut in ((f"before:{moment}", "intent:vmm"), ("intent:vmm", f"after:{moment}"))
    ),
    ("WakeInstance", "before:link_snapshot", "after:vmm"),
    ("WakeInstance", "before:vmm", "after:link_snapshot"),
    # The cgroup is made beside the files.
    *((kind, "before:cgroup", at) for kind in FILES for at in ("before:jail", "after:jail")),
    *((kind, "after:cgroup", "after:jail") for kind in FILES),
    ("StartInstance", "before:data_disk", "after:cgroup"),
    *((kind, "before:jail", "after:cgroup") for kind in FILES),
]


@pytest.mark.parametrize(("kind", "held", "at"), CUTS)
async def test_a_worker_killed_while_one_branch_is_ahead_ends_the_launch(
    kind: str, held: str, at: str, tmp_path: Path
) -> None:
    machine = seeded()
    holding, reached = asyncio.Event(), asyncio.Event()
    armed = False

    async def stop_there(moment: str) -> None:
        if armed and moment == held:
            holding.set()
            await asyncio.Event().wait()
        if armed and moment == at:
            reached.set()
            await asyncio.Event().wait()

    async with memory_worker(tmp_path / "j", machine, failpoint=stop_there) as worker:
        await prepare(worker, kind)
        armed = True
        command_id = await worker.send(COMMANDS[kind])
        await asyncio.wait_for(asyncio.gather(holding.wait(), reached.wait()), 10)
        await worker.kill()

    async with memory_worker(tmp_path / "j", machine) as worker:
        reply = await worker.reply(command_id)

        assert reply.code is Code.OK, reply
        assert shape(machine) == shape(await undisturbed(tmp_path, kind))
        assert max(machine.boots.values(), default=0) <= 1


@pytest.mark.parametrize(
    ("kind", "uses"), [("StartInstance", "configure_vm"), ("WakeInstance", "load_snapshot")]
)
async def test_the_vmm_is_not_told_of_its_tap_before_the_tap_is_there(
    kind: str, uses: str, tmp_path: Path
) -> None:
    moments: list[str] = []
    done = asyncio.Event()

    async def slow_tap(moment: str) -> None:
        moments.append(moment)
        if moment in ("after:vmm", "after:link_snapshot"):
            done.set()
        if moment == "before:tap" and armed:
            await done.wait()

    armed = False
    async with memory_worker(tmp_path / "j", seeded(), failpoint=slow_tap) as worker:
        await prepare(worker, kind)
        moments.clear()
        done.clear()
        armed = True

        assert (await worker.run(COMMANDS[kind])).code is Code.OK

    assert (
        moments.index("before:vmm") < moments.index("after:tap") < moments.index(f"before:{uses}")
    )


@pytest.mark.parametrize("warm", [[], [40]], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", ["StartInstance", "WakeInstance"])
async def test_a_vmm_is_launched_or_taken_only_when_both_cgroup_and_jail_are_there(
    kind: str, warm: list[int], tmp_path: Path
) -> None:
    moments: list[str] = []
    jail = asyncio.Event()
    armed = False
    machine = seeded()

    async def slow_cgroup(moment: str) -> None:
        moments.append(moment)
        if moment == "after:jail":
            jail.set()
        if armed and moment == "before:cgroup":
            await jail.wait()

    async with memory_worker(tmp_path / "j", machine, failpoint=slow_cgroup) as worker:
        await prepare(worker, kind)
        machine.warm = [*warm]
        moments.clear()
        jail.clear()
        armed = True

        assert (await worker.run(COMMANDS[kind])).code is Code.OK

    order = ["after:jail", "after:cgroup", "before:vmm"]
    assert [moment for moment in moments if moment in order] == order


@pytest.mark.parametrize("kind", ["StartInstance", "WakeInstance"])
async def test_the_host_is_told_of_a_launch_that_is_coming_and_of_no_other(
    kind: str, tmp_path: Path
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, kind)
        before = machine.expected_launches

        assert (await worker.run(COMMANDS[kind])).changed
        launched = machine.expected_launches
        assert not (await worker.run(COMMANDS[kind])).changed

    assert (launched, machine.expected_launches) == (before + 1, before + 1)


async def test_a_snapshot_of_another_vmm_version_is_refused_and_stays_asleep(
    tmp_path: Path,
) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "WakeInstance")
        before, status = dict(machine.resources), status_of(worker)
        machine.reported_version = "1.16.1"

        reply = await worker.run(COMMANDS["WakeInstance"])

        assert reply.code is Code.HOST_FAULT
        assert isinstance(reply.response, Error)
        assert "VMM version 1.12.1, found 1.16.1" in reply.response.message
        assert machine.resources == before
        assert status_of(worker) == status


async def test_a_wake_whose_version_is_not_here_makes_nothing(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "WakeInstance")
        before, status = dict(machine.resources), status_of(worker)
        machine.vmm_version = "1.16.1"
        machine.seen.clear()

        reply = await worker.run(COMMANDS["WakeInstance"])

        assert reply.code is Code.HOST_FAULT
        assert isinstance(reply.response, Error)
        assert "Firecracker 1.12.1 is not on this host" in reply.response.message
        assert (machine.resources, machine.seen) == (before, [])
        assert status_of(worker) == status


async def test_a_wake_takes_the_version_that_slept_and_a_start_the_newest(tmp_path: Path) -> None:
    machine = seeded()
    machine.warm = [40, 41]
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "WakeInstance")
        assert worker.journal.records.vmm_versions() == {("1.12.1", "sleeping"): 1}
        machine.vmm_version, machine.older_versions = "1.16.1", ("1.12.1",)
        pools = len(machine.warm)

        assert (await worker.run(COMMANDS["WakeInstance"])).code is Code.OK

        assert len(machine.warm) == pools, "a VMM of another version was taken from the pool"
        assert worker.journal.records.vmm_versions() == {("1.12.1", "running"): 1}
        for kind in ("StopInstance", "StartInstance"):
            assert (await worker.run(COMMANDS[kind])).code is Code.OK
        assert worker.journal.records.vmm_versions() == {("1.16.1", "running"): 1}
        assert len(machine.warm) == pools - 1


async def test_a_start_journals_the_version_that_was_launched(tmp_path: Path) -> None:
    machine = seeded()

    async def replaced(moment: str) -> None:
        if moment == "before:vmm":  # the operator, after the reservation
            machine.reported_version = "1.16.1"

    async with memory_worker(tmp_path / "j", machine, failpoint=replaced) as worker:
        await prepare(worker, "StartInstance")

        assert (await worker.run(COMMANDS["StartInstance"])).code is Code.OK

        assert worker.journal.records.vmm_versions() == {("1.16.1", "running"): 1}


async def test_a_sleep_does_not_ask_the_vmm_for_its_version(tmp_path: Path) -> None:
    machine = seeded()
    async with memory_worker(tmp_path / "j", machine) as worker:
        await prepare(worker, "SleepInstance")
        machine.reported_version = "9.9.9"

        assert (await worker.run(COMMANDS["SleepInstance"])).code is Code.OK

        assert worker.journal.records.vmm_versions() == {("1.12.1", "sleeping"): 1}
        info = await worker.host.snapshots.read(worker.record().ref)
        assert info is not None
        assert info.vmm_version == "1.12.1"
