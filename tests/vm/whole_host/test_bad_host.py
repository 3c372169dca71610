"""A host on which somebody or something is in the way: a full disk, foreign links, stale jails."""

import contextlib
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from handlers.host.vmm.cgroups import find_mount
from schemas import naming
from tests.constants import DESTROY, REF, SLEEP, START, STOP, WAKE
from tests.live_host import LiveHost, live_host


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=True, timeout=10, capture_output=True, text=True)
    return done.stdout


@contextlib.contextmanager
def filled(directory: str, *, leave_mib: int) -> Generator[None]:
    """The file system has no more room than that, inside the `with`."""
    there = os.statvfs(directory)
    size = there.f_bavail * there.f_frsize - (leave_mib << 20)
    path = f"{directory}/filler"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    try:
        yield
    finally:
        os.unlink(path)


@pytest.mark.parametrize("leave_mib", [20, 1])
async def test_a_disk_full_while_sleeping_leaves_the_instance_running(leave_mib: int) -> None:
    async with live_host(disk_mib=200) as host:
        await host.net_up(host.seed(mem_mib=64))
        assert (await host.run(START))["code"] == "ok"
        awake = await host.stat()
        before = await host.inventory()

        with filled(f"{host.directory}/disk", leave_mib=leave_mib):
            refused = await host.run(SLEEP)
            on = await host.stat()

        assert refused["code"] == "exhausted", refused
        assert refused["detail"]["act"] == "scheduler"
        assert refused["status"] == "running"
        assert not refused.get("left_behind")
        assert await host.inventory() == before
        assert on["counter"] > awake["counter"]
        assert (await host.run(SLEEP))["status"] == "sleeping"
        assert (await host.run(WAKE))["code"] == "ok"
        assert (await host.stat())["boot_id"] == awake["boot_id"]


async def test_a_foreign_link_with_the_taps_name_is_a_conflict_and_stays() -> None:
    async with live_host() as host:
        seeded = host.seed()
        await host.net_up(seeded)
        before = await host.inventory()
        ip("tuntap", "add", seeded.tap, "mode", "tap")
        theirs = ip("-d", "link", "show", seeded.tap)

        refused = await host.run(START)

        assert refused["code"] == "conflict", refused
        assert seeded.tap in str(refused["response"])
        assert refused["detail"]["act"] == "sender"
        assert not refused.get("left_behind")
        assert await host.inventory() == before
        assert ip("-d", "link", "show", seeded.tap) == theirs
        ip("link", "delete", seeded.tap)
        assert (await host.run(START))["code"] == "ok"

        assert (await host.run(SLEEP))["code"] == "ok"
        ip("tuntap", "add", seeded.tap, "mode", "tap")
        refused = await host.run(WAKE)
        assert (refused["code"], refused["status"]) == ("conflict", "sleeping"), refused
        assert not refused.get("left_behind")
        ip("link", "delete", seeded.tap)
        assert (await host.run(WAKE))["code"] == "ok"
        assert (await host.stat())["boots"] == 1


async def test_a_stale_jail_and_cgroup_are_in_no_launchs_way() -> None:
    async with live_host() as host:
        seeded = host.seed()
        await host.net_up(seeded)
        before = await host.inventory()
        leave_behind(host, launch=1)
        leave_behind(host, launch=2)

        started = await host.run(START)
        assert started["code"] == "ok", started
        assert (await host.run(SLEEP))["code"] == "ok"
        woken = await host.run(WAKE)

        assert woken["code"] == "ok", woken
        # Not 1 and 2: a launch number is never used twice while the host has a trace of it.
        assert (started["detail"]["launch"], woken["detail"]["launch"]) == (3, 4)
        assert (await host.stat())["boots"] == 1
        assert (await host.run(STOP))["code"] == "ok"
        assert (await host.run(DESTROY))["code"] == "ok"
        assert await host.inventory() == before


def leave_behind(host: LiveHost, launch: int) -> None:
    """What an earlier host daemon may have left under the ids that come next."""
    jail_id = naming.jail_id(REF, launch)
    root = Path(host.settings.jail_base, "firecracker", jail_id, "root")
    (root / "dev").mkdir(parents=True)
    for name in ("api.sock", "v.sock", "firecracker", "vmlinux", "firecracker.pid", "log"):
        (root / name).write_bytes(b"stale")
    leaf = Path(find_mount(), host.settings.limits.cgroup, REF.tenant_id, jail_id)
    leaf.mkdir(parents=True)
