"""The inventory counts everything with hostd's mark, leftovers included, and nothing foreign."""

import asyncio
import contextlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import msgspec
import pytest

from handlers.host.inventory import Inventory, collect
from handlers.host.net.host_network import NetworkMechanisms, open_network_mechanisms
from handlers.host.vmm.cgroups import find_mount
from handlers.specs import BridgeSpec, PinSpec, TapSpec, TenantRulesSpec
from schemas.requests import TenantNet
from schemas.settings import LimitSettings, NetworkSettings, PathSettings, Settings
from tests.kernel.net.netns import Namespace

OURS = "0123456789ab-1"
FOREIGN = "their-vm"
NET = TenantNet(7, "10.240.7.0/24", "10.240.7.1", "br-tenant-7")
NOTHING = Inventory()
CHROOTED = "import os, sys; os.chroot(sys.argv[1]); print(flush=True); sys.stdin.read()"


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    namespace = Namespace()
    yield namespace
    namespace.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "data").mkdir()
    (tmp_path / "state").mkdir()
    return Settings(
        paths=PathSettings(data=f"{tmp_path}/data", state=f"{tmp_path}/state"),
        limits=LimitSettings(cgroup=f"hostd-test-{os.getpid()}-inventory", enforce=False),
    )


@pytest.fixture
def mechanisms(namespace: Namespace) -> Iterator[NetworkMechanisms]:
    mechanisms = open_network_mechanisms(NetworkSettings(), namespace.enter)
    yield mechanisms
    mechanisms.close()


def jail_root(settings: Settings, jail_id: str) -> Path:
    root = Path(settings.jail_base, "firecracker", jail_id, "root")
    root.mkdir(parents=True)
    return root


@contextlib.contextmanager
def running(*command: str) -> Generator[subprocess.Popen[bytes]]:
    """A process that has reported that it is ready; killed afterwards."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def copy(program: str) -> Generator[subprocess.Popen[bytes]]:
    """A copy of cat that has echoed, so that its exec is done."""
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"\n"
        yield process


@contextlib.contextmanager
def cgroup(name: str) -> Generator[Path]:
    """A cgroup, with those above it up to the mount, removed afterwards."""
    path = Path(find_mount(), name)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        while path != Path(find_mount()):
            path.rmdir()
            path = path.parent


def only(found: Inventory, *kinds: str) -> bool:
    """Whether exactly these kinds are not empty."""
    return {kind for kind, count in found.counts.items() if count} == set(kinds)


def test_an_untouched_host_has_nothing(settings: Settings, namespace: Namespace) -> None:
    found = collect(settings, enter=namespace.enter)

    assert found == NOTHING
    assert list(found.counts) == [
        "processes",
        "taps",
        "bridges",
        "cgroups",
        "jails",
        "nft",
        "sockets",
        "disks",
        "snapshots",
        "artifacts",
        "temp",
        "warm",
    ]


async def test_interfaces_and_rules_of_hostd_are_counted_and_foreign_ones_are_not(
    settings: Settings, namespace: Namespace, mechanisms: NetworkMechanisms
) -> None:
    await mechanisms.networks.prepare()
    namespace.ip("link add name br-foreign type bridge")
    namespace.ip("tuntap add tn7i9 mode tap")
    namespace.command("nft", "add table inet other; add set inet other tenants { type ifname; }")
    namespace.command("nft", 'add element inet other tenants { "br-foreign" }')
    before = await asyncio.to_thread(collect, settings, enter=namespace.enter)
    assert before == NOTHING

    tap, mac, ip = "tn7i3", "02:fc:00:07:00:03", "10.240.7.3"
    await mechanisms.bridges.ensure(BridgeSpec("acme", NET))
    await mechanisms.tenant_rules.ensure(TenantRulesSpec("acme", NET))
    await mechanisms.pins.ensure(PinSpec(tap, mac, ip))
    await mechanisms.taps.ensure(
        TapSpec(tap, NET.bridge_name, os.getuid(), mac, ip, "hostd:acme/web/i-1")
    )
    found = await asyncio.to_thread(collect, settings, enter=namespace.enter)

    assert only(found, "taps", "bridges", "nft")
    assert (found.taps, found.bridges) == (("tn7i3",), ("br-tenant-7",))
    assert any("br-tenant-7" in name for name in found.nft)
    assert any(f"{tap} . {mac} . {ip}" in name for name in found.nft)

    await mechanisms.taps.remove(tap)
    await mechanisms.pins.remove(f"{tap},{mac},{ip}")
    await mechanisms.tenant_rules.remove(TenantRulesSpec("acme", NET).key)
    await mechanisms.bridges.remove(NET.bridge_name)
    assert await asyncio.to_thread(collect, settings, enter=namespace.enter) == NOTHING


def test_a_jail_of_hostd_is_counted_with_its_disks_and_sockets_and_a_foreign_one_is_not(
    settings: Settings, namespace: Namespace
) -> None:
    for jail_id in (OURS, FOREIGN):
        root = jail_root(settings, jail_id)
        (root / "rootfs.ext4").touch()
        (root / "secrets").mkdir()
        (root / "secrets/secrets.ext4").touch()
        (root / "link.ext4").symlink_to("/etc/hostname")
        os.mknod(root / "api.sock", stat.S_IFSOCK | 0o600)

    found = collect(settings, enter=namespace.enter)

    assert only(found, "jails", "disks", "sockets")
    assert found.jails == (OURS,)
    assert found.disks == (f"{OURS}/root/rootfs.ext4", f"{OURS}/root/secrets/secrets.ext4")
    assert found.sockets == (f"{OURS}/root/api.sock",)


def test_processes_are_recognized_by_root_and_executable_not_by_name(
    settings: Settings, namespace: Namespace
) -> None:
    for jail_id in (OURS, FOREIGN):
        shutil.copy("/bin/cat", jail_root(settings, jail_id) / "firecracker")
    ours, foreign = (f"{settings.jail_base}/firecracker/{each}/root" for each in (OURS, FOREIGN))
    program = [sys.executable, "-c", CHROOTED]

    with (
        running(*program, ours) as by_root,
        running(*program, foreign),
        copy(f"{ours}/firecracker") as by_exe,
        copy(f"{foreign}/firecracker"),
    ):
        found = collect(settings, enter=namespace.enter)

    assert only(found, "jails", "processes")
    assert set(found.processes) == {str(by_root.pid), str(by_exe.pid)}


def test_a_symlink_in_place_of_the_executable_makes_no_foreign_process_count(
    settings: Settings, namespace: Namespace
) -> None:
    (jail_root(settings, OURS) / "firecracker").symlink_to(f"/proc/{os.getpid()}/exe")

    assert collect(settings, enter=namespace.enter).processes == ()


def test_leaves_of_the_cgroup_and_live_processes_in_them_are_counted(
    settings: Settings, namespace: Namespace
) -> None:
    name = settings.limits.cgroup
    with (
        cgroup(f"{name}/acme/{OURS}") as leaf,
        cgroup(f"{name}-of-another/acme/{OURS}") as foreign,
        running(sys.executable, "-c", "print(flush=True); input()") as child,
        running(sys.executable, "-c", "print(flush=True); input()") as other,
    ):
        (leaf / "cgroup.procs").write_text(str(child.pid))
        (foreign / "cgroup.procs").write_text(str(other.pid))
        found = collect(settings, enter=namespace.enter)
        assert only(found, "cgroups", "processes")
        assert found.cgroups == (f"{name}/acme/{OURS}",)
        assert found.processes == (str(child.pid),)

        for process in (child, other):
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert only(collect(settings, enter=namespace.enter), "cgroups")  # a zombie is no process
        for process in (child, other):
            process.wait()


def test_a_snapshot_directory_is_published_in_use_or_temporary(
    settings: Settings, namespace: Namespace
) -> None:
    base = Path(settings.paths.state, "snapshots/acme/web/i-1")
    for number, names in (
        ("1", ["state", "mem", "manifest.json"]),
        ("2", ["state", "mem"]),
        ("3", ["state", "mem", "consumed.json"]),
        ("4", ["state", "mem", "consumed.json"]),
    ):
        (base / number).mkdir(parents=True)
        for name in names:
            (base / number / name).touch()
    os.link(base / "4" / "mem", base.parent / "in-a-jail")  # the memory of a VM that was woken

    found = collect(settings, enter=namespace.enter)

    assert found.snapshots == ("acme/web/i-1/1",)
    assert found.temp == (f"{base}/2", f"{base}/3")


def test_artifacts_and_temporary_files_are_counted_and_kept_files_are_not(
    settings: Settings, namespace: Namespace
) -> None:
    state, data = Path(settings.paths.state), Path(settings.paths.data)
    instance = data / "tenants/acme/pools/web/instances/i-1"
    for directory in (
        state / "artifacts/acme/web/abc",
        state / "artifacts/acme/web/.def.part",
        state / "logs/acme/web/i-1",
        instance / "volumes",
    ):
        directory.mkdir(parents=True)
    kept = ("logs/acme/web/i-1/1.log", "artifacts/acme/web/abc/vmlinux", "journal.db", "x.json")
    for name in kept:
        (state / name).touch()
    (instance / "volumes/data.ext4").touch()
    (instance / ".instance.json.bak").touch()
    half = [
        state / "artifacts/acme/web/.def.part",
        state / "logs/acme/web/i-1/.2.log",
        state / "x.json.part",
        instance / ".instance.json.hostd",
    ]
    for path in half[1:]:
        path.touch()

    found = collect(settings, enter=namespace.enter)

    assert only(found, "artifacts", "temp")
    assert found.artifacts == ("acme/web/abc",)
    assert found.temp == tuple(sorted(str(path) for path in half))


def test_without_its_directories_a_host_has_nothing(
    settings: Settings, namespace: Namespace
) -> None:
    gone = msgspec.structs.replace(
        settings, paths=PathSettings(data="/nonexistent/a", state="/nonexistent/b")
    )

    assert collect(gone, enter=namespace.enter) == NOTHING
