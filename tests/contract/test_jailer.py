"""What the real jailer does, as far as hostd relies on it or guards against it."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from handlers.host.linux.procfs import read_status
from handlers.host.vmm import processes
from handlers.host.vmm.jailer import Jailer
from handlers.specs import LaunchSpec
from tests.guests.namespace import own_network
from tests.vm.vmm_rig import UID, VmmRig, vmm_rig


@pytest_asyncio.fixture(name="rig")
async def jail_rig(tmp_path: Path) -> AsyncIterator[VmmRig]:
    with own_network():
        async with vmm_rig(tmp_path) as made:
            yield made


def run(rig: VmmRig, spec: LaunchSpec, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command line that hostd uses, with some values changed."""
    arguments = Jailer(rig.settings).arguments(spec)
    for option, value in changes.items():
        arguments[arguments.index(f"--{option.replace('_', '-')}") + 1] = value
    return subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)


async def until(condition: Callable[[], object], *, within_s: float = 5) -> None:
    """Wait for something another process does."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


async def pid_of(rig: VmmRig, spec: LaunchSpec) -> int:
    """From the pid file, which may come later than the socket."""
    path = rig.root(spec) / "firecracker.pid"
    await until(lambda: path.exists() and path.read_text() and _listens(rig, spec))
    return int(path.read_text())


def _listens(rig: VmmRig, spec: LaunchSpec) -> bool:
    return (rig.root(spec) / "api.sock").exists()


async def test_the_pid_file_holds_the_vmms_pid_in_our_namespace_and_the_cgroup_agrees(
    rig: VmmRig,
) -> None:
    spec = await rig.prepare()

    assert run(rig, spec).returncode == 0

    pid = await pid_of(rig, spec)
    await until(lambda: rig.tree.pids(spec.cgroup) == [pid])
    assert read_status(f"/proc/{pid}/status", ("NSpid",))["NSpid"] == f"{pid} 1"


async def test_a_missing_parent_cgroup_is_silently_ignored(rig: VmmRig) -> None:
    spec = await rig.prepare()

    outcome = run(rig, spec, parent_cgroup=f"{rig.tree.base}/nobody/made-this")

    assert (outcome.returncode, outcome.stderr) == (0, "")
    pid = await pid_of(rig, spec)
    pidfd = os.pidfd_open(pid)
    try:
        assert processes.read_cgroup(pid) == processes.read_cgroup(os.getpid())
        assert not rig.tree.pids(spec.cgroup)
    finally:
        processes.send(pidfd, signal.SIGKILL)
        await processes.wait_exit(pidfd)
        os.close(pidfd)


async def test_in_its_own_pid_namespace_sigterm_is_ignored_and_sigkill_is_not(rig: VmmRig) -> None:
    spec = await rig.prepare()
    run(rig, spec)
    pid = await pid_of(rig, spec)
    pidfd = os.pidfd_open(pid)
    try:
        processes.send(pidfd, signal.SIGTERM)
        assert not await processes.wait_exit(pidfd, 0.1)

        processes.send(pidfd, signal.SIGKILL)
        assert await processes.wait_exit(pidfd, 5)
    finally:
        os.close(pidfd)


async def test_a_jail_in_which_a_vmm_died_refuses_the_next(rig: VmmRig) -> None:
    spec = await rig.prepare()
    run(rig, spec)
    await pid_of(rig, spec)
    await rig.vmms.remove(spec.jail_id)

    outcome = run(rig, spec)

    assert outcome.returncode == -signal.SIGABRT
    assert "File exists" in outcome.stderr
    assert (rig.root(spec) / "api.sock").exists()


async def test_without_the_log_file_the_vmm_dies_silently(rig: VmmRig) -> None:
    spec = await rig.prepare()
    (rig.root(spec) / "log").unlink()

    outcome = run(rig, spec)

    assert (outcome.returncode, outcome.stderr) == (0, "")
    await until(lambda: not rig.tree.pids(spec.cgroup))
    assert not (rig.root(spec) / "api.sock").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": "a_b"}, "Invalid char (_)"),
        ({"id": "a" * 65}, "64"),
        ({"exec_file": "/nope/firecracker"}, "/nope/firecracker"),
        ({"chroot_base_dir": "/nope"}, "/nope"),
        ({"parent_cgroup": "/absolute"}, "absolute"),
        ({"parent_cgroup": "../x"}, ".."),
    ],
)
async def test_an_invalid_argument_is_named_and_the_exit_status_is_not_0(
    rig: VmmRig, changes: dict[str, str], words: str
) -> None:
    spec = await rig.prepare()

    outcome = run(rig, spec, **changes)

    assert outcome.returncode != 0
    assert words in outcome.stderr
    assert not rig.tree.pids(spec.cgroup)


async def test_neither_environment_nor_descriptors_reach_the_vmm(rig: VmmRig) -> None:
    spec = await rig.prepare()
    canary = os.open(rig.directory, os.O_RDONLY)
    os.set_inheritable(canary, True)
    try:
        subprocess.run(
            Jailer(rig.settings).arguments(spec),
            env={"CANARY": "1"},
            close_fds=False,
            check=True,
            timeout=20,
        )
    finally:
        os.close(canary)

    pid = await pid_of(rig, spec)
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""
    opened = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert str(rig.directory) not in opened
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} <= {"/dev/null", "/null"}


async def test_the_jail_is_closed_to_others_whatever_the_umask(rig: VmmRig) -> None:
    spec = await rig.prepare()
    rig.root(spec).chmod(0o755)
    await rig.vmms.ensure(spec)

    root, api = os.stat(rig.root(spec)), os.stat(rig.root(spec) / "api.sock")

    assert (root.st_mode & 0o777, root.st_uid) == (0o700, UID)
    assert api.st_uid == UID
