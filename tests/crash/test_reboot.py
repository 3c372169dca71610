"""After a reboot: running is stopped, sleeping stays, networks stand again, half-done work ends."""

import sqlite3
import subprocess
import uuid
from pathlib import Path

from handlers.host.linux.procfs import boot_id
from handlers.host.vmm.cgroups import find_mount
from schemas.requests import InstanceRef, SleepInstance, StartInstance, TenantNet, WakeInstance
from tests.constants import REF, SLEEP, START, WAKE
from tests.crash.kills import assert_one_outcome, events, kill_at, until
from tests.crash.test_deaths import end_vmm
from tests.live_host import LiveHost, live_host
from worker.demo.guest import echo_through_tap

OTHER = InstanceRef("acme", "web", "i-2")
OTHER_NAMES = (OTHER.tenant_id, OTHER.pool_id, OTHER.instance_id)


async def reboot(host: LiveHost, net: TenantNet) -> None:
    """Take away all that does not survive one: processes, links, rules, cgroups, mounts; and have
    the journal remember another boot, as it would."""
    await host.kill_worker()
    for pid in host.vm_pids():
        await end_vmm(pid)
    await until(lambda: not host.vm_pids(), "the end of all VMMs")
    subprocess.run(["ip", "link", "del", net.bridge_name], check=True)
    links = subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True)
    for line in links.stdout.splitlines():
        name = line.split()[1].rstrip(":")
        if name != "lo":
            subprocess.run(["ip", "link", "del", name], check=True)
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    top = Path(find_mount(), host.settings.limits.cgroup)
    for directory in sorted(top.glob("**/"), reverse=True):
        directory.rmdir()
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        point = line.split()[1]
        if point.startswith(f"{host.settings.paths.state}/"):
            subprocess.run(["umount", point], check=True)
    another = str(uuid.uuid4())
    with sqlite3.connect(f"{host.settings.paths.state}/journal.db") as journal:
        journal.execute("UPDATE meta SET value = ? WHERE key = 'boot_id'", (another,))
        journal.execute(
            "UPDATE instance SET record = CAST(replace(CAST(record AS TEXT), ?, ?) AS BLOB)",
            (boot_id(), another),
        )
    journal.close()


async def test_running_is_stopped_sleeping_stays_and_networks_stand_again() -> None:
    async with live_host() as host:
        seeded, other = host.seed(secrets=b"{}"), host.seed(OTHER)
        await host.net_up(seeded)
        before = await host.inventory()
        await host.run(START)
        await host.run(StartInstance(*OTHER_NAMES))
        slept = await host.stat(OTHER)
        await host.run(SleepInstance(*OTHER_NAMES, force=False))

        await reboot(host, seeded.net)
        await host.start_worker()

        assert (await host.describe())["status"] == "stopped"
        assert (await host.describe(OTHER))["status"] == "sleeping"
        assert await host.inventory() == before | {"artifacts": 1, "snapshots": 1}
        (recovered,) = [e for e in await events(host) if e["kind"] == "recovered"][-1:]
        assert recovered["reason"] == "the host was rebooted"
        assert (await host.run(WakeInstance(*OTHER_NAMES)))["code"] == "ok"
        woken = await host.stat(OTHER)
        assert (woken["boots"], woken["boot_id"]) == (1, slept["boot_id"])
        assert woken["counter"] > slept["counter"]
        assert (await host.run(START))["code"] == "ok"
        assert (await host.stat())["boots"] == 2
        for guest in (seeded, other):
            assert await echo_through_tap(guest.guest_ip, b"after the reboot") < 20


async def test_a_start_cut_by_the_reboot_is_taken_back() -> None:
    async with live_host() as host:
        seeded = host.seed()
        await host.net_up(seeded)
        before = await host.inventory()
        await kill_at(host, "after:start_vm", START, "cut")

        await reboot(host, seeded.net)
        await host.start_worker()
        await host.result("cut")

        reply = await assert_one_outcome(host, "cut")
        assert (reply["code"], reply["left_behind"]) == ("unavailable", [])
        assert await host.inventory() == before
        assert (await host.run(START))["code"] == "ok"


async def test_a_sleep_cut_by_the_reboot_before_its_manifest_leaves_it_stopped() -> None:
    async with live_host() as host:
        seeded = host.seed()
        await host.net_up(seeded)
        before = await host.inventory()
        await host.run(START)
        await kill_at(host, "after:snapshot_draft", SLEEP, "cut")

        await reboot(host, seeded.net)
        await host.start_worker()
        await host.result("cut")

        reply = await assert_one_outcome(host, "cut")
        assert (reply["code"], reply["left_behind"]) == ("unavailable", [])
        await host.wait_status("stopped")
        assert await host.inventory() == before | {"artifacts": 1}
        assert (await host.run(START))["code"] == "ok"


async def test_a_sleep_cut_by_the_reboot_after_its_manifest_sleeps() -> None:
    async with live_host() as host:
        seeded = host.seed()
        await host.net_up(seeded)
        await host.run(START)
        slept = await host.stat()
        await kill_at(host, "after:publish_snapshot", SLEEP, "cut")

        await reboot(host, seeded.net)
        await host.start_worker()
        await host.result("cut")

        assert (await assert_one_outcome(host, "cut"))["code"] == "ok"
        assert (await host.run(WAKE))["code"] == "ok"
        assert (await host.stat())["boot_id"] == slept["boot_id"]


async def test_a_wake_cut_by_the_reboot_before_its_point_keeps_the_snapshot() -> None:
    async with live_host() as host:
        seeded = host.seed()
        await host.net_up(seeded)
        await host.run(START)
        await host.run(SLEEP)
        slept = await host.describe(REF)
        await kill_at(host, "after:load_snapshot", WAKE, "cut")

        await reboot(host, seeded.net)
        await host.start_worker()
        await host.result("cut")

        # Nothing ran, so the command itself goes on and wakes it.
        assert (await assert_one_outcome(host, "cut"))["code"] == "ok"
        assert (await host.describe())["launch"] == slept["launch"] + 1
        assert (await host.stat())["boots"] == 1
