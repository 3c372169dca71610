"""The journal is lost while VMs run and sleep: what can be proven is adopted, nothing is killed."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any, TypeVar

import pytest
from click.testing import CliRunner, Result

from handlers.host.vmm.cgroups import find_mount
from handlers.host.vmm.processes import read_stat
from schemas.codes import EXIT_CODES, Code
from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from tests.constants import DESTROY, REF, SLEEP, START, STOP, WAKE
from tests.live_host import LiveHost, live_host
from tests.plain import unpacked
from worker.cli.context import CliError
from worker.cli.main import main
from worker.demo.host import environment_of

OTHER = InstanceRef("acme", "web", "i-2")
ALL = RUNS, SLEEPS, STOPPED, LOST = "i-1", "i-2", "i-3", "i-4"
MARK = b"written before the journal was lost"

Command = TypeVar("Command", StartInstance, StopInstance)


def of(command: type[Command], name: str) -> Command:
    return command("acme", "web", name)


async def hostd(host: LiveHost, *args: str) -> Result:
    """The command line, in a thread, with the host's settings."""
    setting = {"HOSTD_CONFIG": None, **environment_of(host.settings)}
    return await asyncio.to_thread(CliRunner().invoke, main, args, env=setting)


def disk_of(host: LiveHost, name: str) -> Path:
    instances = Path(host.settings.paths.data, "tenants/acme/pools/web/instances")
    return instances / name / "volumes/data.ext4"


def write_mark(disk: Path) -> None:
    """In its last block, as the host's root can at rest."""
    with disk.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(MARK)


def has_mark(disk: Path) -> bool:
    return MARK in disk.read_bytes()[-4096:]


async def until_swept(host: LiveHost, jail: Path) -> None:
    """Sweep as the page says, until the jail is gone: two sightings are 60 s apart."""
    async with asyncio.timeout(180):
        while jail.exists():
            assert (await hostd(host, "sweep")).exit_code == 0
            await asyncio.sleep(1)


async def until_gone(pid: int) -> None:
    """Its memory goes first; until it is a zombie it counts as a process with its uid."""
    async with asyncio.timeout(10):
        while (found := read_stat(pid)) is not None and found[0] not in "ZX":
            await asyncio.sleep(0.01)


async def until_removed(cgroup: Path) -> None:
    """A kernel thread of KVM leaves it a moment after its VM."""
    async with asyncio.timeout(10):
        while True:
            try:
                return cgroup.rmdir()
            except OSError:
                await asyncio.sleep(0.01)


async def events(host: LiveHost) -> list[dict[str, Any]]:
    return [unpacked(data) for _, _, data in await host.kept(host.subjects.events_stream)]


def lose_journal(host: LiveHost) -> None:
    for path in Path(host.settings.paths.state).glob("journal.db*"):
        path.unlink()


async def test_running_and_sleeping_instances_outlive_the_journal() -> None:
    async with live_host() as host:
        before = await host.inventory()
        seeded = host.seed()
        host.seed(OTHER)
        await host.net_up(seeded)
        started = await host.run(START)
        await host.run(StartInstance("acme", "web", "i-2"))
        asleep = await host.stat(OTHER)
        assert (await host.run(SleepInstance("acme", "web", "i-2", force=False)))["code"] == "ok"
        awake = await host.stat()
        await host.kill_worker()
        lose_journal(host)

        await host.start_worker()

        adopted = await host.describe()
        assert (adopted["status"], adopted["pid"]) == ("running", started["detail"]["pid"])
        assert (await host.run(SLEEP))["code"] == "ok"
        assert (await host.run(WAKE))["code"] == "ok"
        assert (await host.stat())["boot_id"] == awake["boot_id"]
        woken = await host.run(WakeInstance("acme", "web", "i-2"))
        assert woken["code"] == "ok", woken
        assert (await host.stat(OTHER))["boot_id"] == asleep["boot_id"]
        assert (await host.run(STOP))["code"] == "ok"
        assert (await host.run(DESTROY))["code"] == "ok"
        destroyed = await host.run(type(DESTROY)("acme", "web", "i-2", wipe_volumes=True))
        assert destroyed["code"] == "ok"
        assert (await host.net_down(seeded.net))["code"] == "ok"
        assert await host.inventory() == before


async def test_a_vm_without_a_note_is_left_alone_and_reported() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        pid = (await host.run(START))["detail"]["pid"]
        note = Path(await host.jail_root()).parent / "hostd.json"
        await host.kill_worker()
        lose_journal(host)
        note.unlink()

        await host.start_worker()

        os.kill(pid, 0)
        kept = await host.kept(host.subjects.events_stream)
        assert any(subject.endswith(".quarantined") for subject, _, _ in kept)
        with pytest.raises(CliError, match="not in the journal"):
            await host.describe(REF)


async def test_a_start_of_an_instance_whose_vm_is_in_no_journal_leaves_that_vm_alone() -> None:
    async with live_host() as host:
        seeded = host.seed()
        await host.net_up(seeded)
        pid = (await host.run(START))["detail"]["pid"]
        root = Path(await host.jail_root())
        await host.kill_worker()
        lose_journal(host)
        (root.parent / "hostd.json").unlink()
        await host.start_worker()
        await host.net_up(seeded)

        reply = await host.run(START)

        assert (reply["code"], reply["detail"]["jail"]) == ("conflict", root.parent.name)
        os.kill(pid, 0)
        assert root.is_dir()


async def test_another_instance_is_not_given_the_uid_of_a_vm_that_is_in_no_journal() -> None:
    async with live_host() as host:
        seeded = host.seed()
        host.seed(OTHER)
        await host.net_up(seeded)
        pid = (await host.run(START))["detail"]["pid"]
        root = Path(await host.jail_root())
        await host.kill_worker()
        lose_journal(host)
        (root.parent / "hostd.json").unlink()
        await host.start_worker()
        await host.net_up(seeded)

        reply = await host.run(StartInstance("acme", "web", "i-2"))

        assert reply["code"] == "ok", reply
        uids = {os.stat(f"/proc/{each}").st_uid for each in (pid, reply["detail"]["pid"])}
        assert len(uids) == 2
        vmm = host.settings.vmm
        assert uids <= set(range(vmm.uid_base, vmm.uid_base + vmm.uid_count))


async def test_a_host_that_lost_its_journal_is_back_in_full_service_by_documented_commands() -> (
    None
):
    """The walkthrough of docs/operations.md, "A lost journal"."""
    async with live_host() as host:
        before = await host.inventory()
        seeded = [
            host.seed(InstanceRef("acme", "web", name)) for name in (RUNS, SLEEPS, STOPPED, LOST)
        ]
        await host.net_up(seeded[0])
        pids = {name: (await host.run(of(StartInstance, name)))["detail"]["pid"] for name in ALL}
        await host.run(SleepInstance("acme", "web", SLEEPS, force=False))
        await host.run(of(StopInstance, STOPPED))
        disk = disk_of(host, STOPPED)
        write_mark(disk)
        lost = Path(await host.jail_root(InstanceRef("acme", "web", LOST)))
        await host.kill_worker()
        lose_journal(host)
        (lost.parent / "hostd.json").unlink()

        # 1. What could be proven is there again, what could not is left alone.
        await host.start_worker()
        assert (await host.describe(InstanceRef("acme", "web", RUNS)))["status"] == "running"
        refused = await hostd(host, "adopt", "acme", "web", LOST)
        assert refused.exit_code == EXIT_CODES[Code.CONFLICT]
        assert "has no metadata" in refused.output
        os.kill(pids[LOST], 0)
        # 2. Networks are set up again.
        assert (await hostd(host, "net-up", "acme")).exit_code == 0
        # 3. Sleeping instances wake.
        assert (await hostd(host, "wake", "acme", "web", SLEEPS)).exit_code == 0
        # 4. Stopped instances that used their disk are adopted, then they start.
        assert (await host.run(of(StartInstance, STOPPED)))["code"] == "invalid"
        adopted = await hostd(host, "adopt", "acme", "web", STOPPED)
        assert (adopted.exit_code, "stopped (adopted)" in adopted.output) == (0, True), adopted
        again = await hostd(host, "adopt", "acme", "web", STOPPED, "--json")
        assert json.loads(again.output)["changed"] is False
        assert (await hostd(host, "start", "acme", "web", STOPPED)).exit_code == 0
        assert has_mark(disk)
        # 5. A VMM that nothing explains is ended by hand, and what it leaves is swept.
        kept = await hostd(host, "sweep", "--dry-run")
        assert f"process {pids[LOST]}, a VMM without a record" in kept.output
        leaf = Path(find_mount(), host.settings.limits.cgroup, "acme", lost.parent.name)
        (leaf / "cgroup.kill").write_text("1")
        await until_swept(host, lost)
        assert (await hostd(host, "adopt", "acme", "web", LOST)).exit_code == 0
        assert (await hostd(host, "start", "acme", "web", LOST)).exit_code == 0

        for name in ALL:
            done = await host.run(DestroyInstance("acme", "web", name, wipe_volumes=True))
            assert done["code"] == "ok", done
        assert (await host.net_down(seeded[0].net))["code"] == "ok"
        assert await host.inventory() == before
        kinds = {event["kind"] for event in await events(host)}
        assert {"recovered", "quarantined", "removed"} <= kinds


async def test_a_released_vm_runs_on_through_a_restart_and_is_adopted_again() -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        started = await host.run(START)
        pid, awake = started["detail"]["pid"], await host.stat()

        released = await hostd(host, "release", "acme", "web", REF.instance_id)
        assert (released.exit_code, "released (released)" in released.output) == (0, True)
        await host.kill_worker()
        await host.start_worker()
        with pytest.raises(CliError, match="not in the journal"):
            await host.describe(REF)
        assert (await host.run(START))["code"] == "conflict"
        os.kill(pid, 0)
        adopted = await hostd(host, "adopt", "acme", "web", REF.instance_id)

        assert (adopted.exit_code, "running (adopted)" in adopted.output) == (0, True), adopted
        assert (await host.describe())["pid"] == pid
        assert (await host.stat())["boot_id"] == awake["boot_id"]
        assert (await host.run(SLEEP))["code"] == "ok"
        assert (await host.run(WAKE))["code"] == "ok"
        assert (await host.run(STOP))["code"] == "ok"


@pytest.mark.parametrize("signal_first", [False, True])
async def test_an_instance_whose_vmm_left_its_cgroup_is_adopted_when_it_is_back(
    signal_first: bool,
) -> None:
    async with live_host() as host:
        await host.net_up(host.seed())
        pid = (await host.run(START))["detail"]["pid"]
        root = Path(await host.jail_root())
        leaf = Path(find_mount(), host.settings.limits.cgroup, "acme", root.parent.name)
        elsewhere = leaf.parent / "elsewhere"
        elsewhere.mkdir()
        await host.kill_worker()
        (elsewhere / "cgroup.procs").write_text(str(pid))

        await host.start_worker()
        refused = await hostd(host, "adopt", "acme", "web", REF.instance_id)
        os.kill(pid, 0)
        if signal_first:
            os.kill(pid, signal.SIGKILL)
            await until_gone(pid)
        else:
            (leaf / "cgroup.procs").write_text(str(pid))
        done = await hostd(host, "adopt", "acme", "web", REF.instance_id)

        await until_removed(elsewhere)
        assert refused.exit_code == EXIT_CODES[Code.CONFLICT]
        expected = "stopped" if signal_first else "running"
        assert f"{expected} (" in done.output, done.output
        code = (await host.run(START if signal_first else STOP))["code"]
        assert code == "ok"
