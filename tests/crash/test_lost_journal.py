"""The journal is lost while VMs run and sleep: what can be proven is adopted, nothing is killed."""

import os
from pathlib import Path

import pytest

from schemas.requests import InstanceRef, SleepInstance, StartInstance, WakeInstance
from tests.constants import DESTROY, REF, SLEEP, START, STOP, WAKE
from tests.live_host import LiveHost, live_host
from worker.cli.context import CliError

OTHER = InstanceRef("acme", "web", "i-2")


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
