"""The inventory while VMs run: all that is ours, nothing foreign, and the same after as before."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

from handlers.host.vmm.cgroups import find_mount
from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    SleepInstance,
    StartInstance,
)
from tests.live_host import LiveHost, live_host

WAIT = "import sys; print(flush=True); sys.stdin.read()"
JOIN = "import sys; open(sys.argv[1], 'w').write('0'); print(flush=True); sys.stdin.read()"
AWAKE, ASLEEP = InstanceRef("acme", "web", "awake"), InstanceRef("acme", "web", "asleep")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10, capture_output=True)


@contextlib.contextmanager
def process(*command: str) -> Generator[None]:
    """A process that has said that it is in its place, gone afterwards."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == b"\n"
            yield
        finally:
            running.kill()


@contextlib.contextmanager
def link(name: str, *, alias: str = "", kind: str = "tap") -> Generator[None]:
    if kind == "tap":
        ip("tuntap", "add", name, "mode", "tap")
    else:
        ip("link", "add", name, "type", kind)
    try:
        if alias:
            ip("link", "set", name, "alias", alias)
        yield
    finally:
        ip("link", "delete", name)


@contextlib.contextmanager
def file(path: Path) -> Generator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"planted")
    try:
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def jail(host: LiveHost, jail_id: str) -> Generator[None]:
    directory = Path(host.settings.jail_base, "firecracker", jail_id)
    (directory / "root").mkdir(parents=True)
    (directory / "root" / "theirs.ext4").touch()
    try:
        yield
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def leaf(path: Path) -> Generator[Path]:
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        while path.exists():
            with contextlib.suppress(OSError):  # its process goes a moment after its kill
                path.rmdir()
        with contextlib.suppress(OSError):
            path.parent.rmdir()


async def test_the_inventory_of_a_host_at_work() -> None:
    async with live_host() as host:
        before = await host.inventory()
        assert not any(before.values()), before
        for ref, offset in ((AWAKE, 5), (ASLEEP, 6)):
            seeded = host.seed(ref, offset=offset, mem_mib=32, secrets=b"{}")
            await host.net_up(seeded)
            start = StartInstance(ref.tenant_id, ref.pool_id, ref.instance_id)
            assert (await host.run(start))["code"] == "ok"
        sleep = SleepInstance(ASLEEP.tenant_id, ASLEEP.pool_id, ASLEEP.instance_id, force=False)
        assert (await host.run(sleep))["code"] == "ok"

        busy = await host.inventory()

        one = ("processes", "taps", "bridges", "cgroups", "jails", "snapshots", "artifacts")
        assert {kind: busy[kind] for kind in one} == dict.fromkeys(one, 1), busy
        assert busy["sockets"] == 2, "the API and vsock"
        assert busy["disks"] == 4, "root, data, config, secrets"
        assert busy["nft"] >= 3, "tenant, gateway, guest"
        assert busy["temp"] == 0
        await foreign_things_do_not_count(host, busy)
        await leftovers_of_ours_count(host, busy)
        for ref in (AWAKE, ASLEEP):
            destroy = DestroyInstance(
                ref.tenant_id, ref.pool_id, ref.instance_id, wipe_volumes=True
            )
            assert (await host.run(destroy))["code"] == "ok"
        assert (await host.net_down(seeded.net))["code"] == "ok"
        assert await host.inventory() == before


async def foreign_things_do_not_count(host: LiveHost, busy: dict[str, int]) -> None:
    state = Path(host.settings.paths.state)
    mount = Path(find_mount())
    with contextlib.ExitStack() as planted:
        planted.enter_context(link("tn7i99"))
        planted.enter_context(link("tn7i98", alias="somebody:else"))
        planted.enter_context(link("br-tenant-8", kind="bridge", alias="somebody:else"))
        planted.enter_context(process(sys.executable, "-c", WAIT))
        planted.enter_context(jail(host, "their-vm"))
        theirs = planted.enter_context(leaf(mount / f"{host.settings.limits.cgroup}x" / "acme"))
        planted.enter_context(
            process(sys.executable, "-c", JOIN, os.fspath(theirs / "cgroup.procs"))
        )
        planted.enter_context(file(state / "notes-of-the-operator"))

        assert await host.inventory() == busy
    assert await host.inventory() == busy


async def leftovers_of_ours_count(host: LiveHost, busy: dict[str, int]) -> None:
    state = Path(host.settings.paths.state)
    directory = Path(find_mount(), host.settings.limits.cgroup, "umbra", "0123456789ab-1")
    with contextlib.ExitStack() as planted:
        planted.enter_context(link("tn9i9", alias="hostd:umbra/web/lost"))
        planted.enter_context(link("br-tenant-9", kind="bridge", alias="hostd:umbra"))
        planted.enter_context(jail(host, "0123456789ab-1"))
        ours = planted.enter_context(leaf(directory))
        planted.enter_context(process(sys.executable, "-c", JOIN, os.fspath(ours / "cgroup.procs")))
        planted.enter_context(file(state / "artifacts" / "umbra" / "web" / "r1" / "vmlinux"))
        planted.enter_context(file(state / "snapshots" / "umbra" / "web" / "lost" / "1" / "mem"))

        now = await host.inventory()
        more = {kind: now[kind] - busy[kind] for kind in now if now[kind] != busy[kind]}
        assert more == {
            "taps": 1,
            "bridges": 1,
            "jails": 1,
            "cgroups": 1,
            "processes": 1,
            "disks": 1,
            "artifacts": 1,
            "temp": 1,
        }
    for kind in ("artifacts", "snapshots"):
        shutil.rmtree(state / kind / "umbra")
    assert await host.inventory() == busy
