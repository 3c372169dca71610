"""Identity of a process: what proves it, and what is never signalled."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.errors import HostFault
from handlers.host.vmm import processes
from handlers.host.vmm.cgroups import find_mount
from schemas.records import VmmIdentity


@contextlib.contextmanager
def sleeper() -> Generator[subprocess.Popen[bytes]]:
    """A child that waits for a line and exits; killed and reaped afterwards."""
    program = [sys.executable, "-c", "import sys; sys.stdin.read(1); sys.exit(7)"]
    with subprocess.Popen(program, stdin=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def identity_of(pid: int) -> VmmIdentity:
    identity = processes.read_identity(pid)
    assert identity is not None
    return identity


def proves(identity: VmmIdentity) -> bool:
    pidfd = processes.prove(identity)
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None


def test_a_live_process_is_proven_by_its_whole_identity() -> None:
    with sleeper() as child:
        assert proves(identity_of(child.pid))


@pytest.mark.parametrize("change", [{"start_ticks": 1}, {"boot_id": "another"}])
def test_a_pid_that_another_process_may_have_is_gone(change: dict[str, object]) -> None:
    with sleeper() as child:
        assert not proves(replace(identity_of(child.pid), **change))


@pytest.mark.parametrize("change", [{"exe_ino": 1}, {"exe_dev": 1}, {"cgroup": "elsewhere"}])
def test_a_process_with_another_cgroup_or_executable_is_neither_gone_nor_signalled(
    change: dict[str, object],
) -> None:
    with sleeper() as child:
        with pytest.raises(HostFault, match="not signalled"):
            processes.prove(replace(identity_of(child.pid), **change))

        assert child.poll() is None


def test_a_process_moved_to_another_cgroup_is_not_proven() -> None:
    there = Path(find_mount(), f"hostd-test-{os.getpid()}-moved")
    with sleeper() as child:
        identity = identity_of(child.pid)
        there.mkdir()
        try:
            (there / "cgroup.procs").write_text(str(child.pid))

            with pytest.raises(HostFault, match="not signalled"):
                processes.prove(identity)
        finally:
            child.kill()
            child.wait()
            there.rmdir()


def test_a_zombie_is_gone() -> None:
    with sleeper() as child:
        identity = identity_of(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

        assert processes.read_stat(child.pid) is not None
        assert not proves(identity)
        assert processes.read_identity(child.pid) is None


def test_a_signal_to_a_process_that_exited_is_success() -> None:
    with sleeper() as child:
        pidfd = processes.open_pidfd(child.pid)
        assert pidfd is not None
        child.kill()
        child.wait()

        processes.send(pidfd, signal.SIGKILL)

        os.close(pidfd)


async def test_waiting_ends_when_the_time_is_up() -> None:
    with sleeper() as child:
        pidfd = processes.open_pidfd(child.pid)
        assert pidfd is not None
        try:
            assert not await processes.wait_exit(pidfd, 0.01)
            assert child.stdin is not None
            child.stdin.close()
            assert await processes.wait_exit(pidfd, 5)
        finally:
            os.close(pidfd)


def test_a_name_with_brackets_and_blanks_does_not_shift_the_fields() -> None:
    program = "import ctypes; ctypes.CDLL(None).prctl(15, b') 1 (x)', 0, 0, 0); input(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as child:
        before = processes.read_stat(child.pid)
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
        until_named(child.pid)

        after = processes.read_stat(child.pid)

        child.kill()
    assert before is not None
    assert after is not None
    assert after[1] == before[1]
    assert after[0] in "RSD"


def until_named(pid: int) -> None:
    for _ in range(100_000):
        if ") 1 (x)" in Path(f"/proc/{pid}/comm").read_text():
            return
        os.sched_yield()
    pytest.fail("the name did not change")


UIDS = range(812_000, 812_004)


@contextlib.contextmanager
def sleeper_of(uid: int, *, dumpable: bool) -> Generator[None]:
    program = (
        "import ctypes, os, sys\n"
        f"os.setresuid({uid}, {uid}, {uid})\n"
        f"ctypes.CDLL(None).prctl(4, {int(dumpable)})\n"
        "print(flush=True)\n"
        "sys.stdin.read(1)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"\n"
            yield
        finally:
            child.kill()


def listed() -> set[int]:
    return set(filter(processes.is_listed, UIDS))


def test_uids_in_use_are_those_of_live_processes_dumpable_or_not() -> None:
    assert processes.uids_in_use(UIDS) == listed() == set()

    with (
        sleeper_of(UIDS[1], dumpable=True),
        sleeper_of(UIDS[3], dumpable=False),
        sleeper_of(UIDS.stop, dumpable=True),
    ):
        assert processes.uids_in_use(UIDS) == listed() == {UIDS[1], UIDS[3]}

    assert processes.uids_in_use(UIDS) == listed() == set()


def test_a_zombie_is_listed_and_not_in_use() -> None:
    if (pid := os.fork()) == 0:  # executes nothing: other uids may not reach any program here
        os.setuid(UIDS[2])
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        assert processes.is_listed(UIDS[2])
        assert processes.uids_in_use(UIDS) == set()
    finally:
        os.waitpid(pid, 0)


def test_the_id_of_a_thread_is_no_process() -> None:
    """A VMM's pid may be a thread's by now, and the kernel answers as for one that is reaped."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        assert processes.open_pidfd(thread.native_id) is None
    finally:
        end.set()
        thread.join()
