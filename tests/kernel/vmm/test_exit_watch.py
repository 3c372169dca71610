"""The exit status of a process that is not hostd's child: zombie, reaped, gone."""

import asyncio
import os
import select
import signal
from collections.abc import Callable

import pytest

from handlers.host.vmm import processes
from handlers.host.vmm.exit_watch import ExitWatch, Newborn, read_exit_status, status_of
from handlers.vmm_ends import ExitStatus
from schemas.records import VmmIdentity


def child(end: Callable[[], None]) -> tuple[int, int, VmmIdentity]:
    """A forked child that does `end` when told to: its pid, the pipe to tell it, its identity."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        os.read(told, 1)
        end()
        os._exit(99)
    os.close(told)
    identity = processes.read_identity(pid)
    assert identity is not None
    return pid, tell, identity


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ENDS = [(lambda: os._exit(7), ExitStatus(code=7)), (kill_itself, ExitStatus(signal=9))]


@pytest.mark.parametrize(("end", "status"), ENDS, ids=["code", "signal"])
async def test_the_watch_reads_the_status_of_a_zombie(
    end: Callable[[], None], status: ExitStatus
) -> None:
    pid, tell, identity = child(end)
    watch = asyncio.create_task(ExitWatch().watch(identity))
    await asyncio.sleep(0)
    try:
        os.close(tell)

        async with asyncio.timeout(10):
            assert await watch == status
        assert ExitWatch().left_by(identity) == status
    finally:
        os.waitpid(pid, 0)


@pytest.mark.parametrize(("end", "status"), ENDS, ids=["code", "signal"])
def test_the_pidfd_has_the_status_once_the_process_was_reaped(
    end: Callable[[], None], status: ExitStatus
) -> None:
    pid, tell, _ = child(end)
    pidfd = os.pidfd_open(pid)
    try:
        os.close(tell)
        os.waitpid(pid, 0)
        wait_status = read_exit_status(pidfd)
    finally:
        os.close(pidfd)

    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < (6, 15):
        assert wait_status is None
    else:
        assert status_of(wait_status) == status


async def test_of_a_process_that_was_reaped_before_the_watch_nothing_is_known() -> None:
    pid, tell, identity = child(kill_itself)
    os.close(tell)
    os.waitpid(pid, 0)

    async with asyncio.timeout(1):
        assert await ExitWatch().watch(identity) == ExitStatus()
    assert ExitWatch().left_by(identity) == ExitStatus()


async def test_the_status_of_another_process_with_that_pid_is_not_taken() -> None:
    pid, tell, identity = child(kill_itself)
    pidfd = os.pidfd_open(pid)
    os.close(tell)
    select.select([pidfd], [], [], 10)
    try:
        later = VmmIdentity(pid, identity.start_ticks - 1, 1, 1, identity.cgroup, identity.boot_id)
        before = VmmIdentity(pid, identity.start_ticks, 1, 1, identity.cgroup, "another-boot")

        assert ExitWatch().left_by(later) == ExitWatch().left_by(before) == ExitStatus()
    finally:
        os.close(pidfd)
        os.waitpid(pid, 0)


def test_a_call_that_goes_on_after_its_launch_has_failed_holds_no_process() -> None:
    before = os.listdir("/proc/self/fd")
    born = Newborn()
    born.see([os.getppid()])

    born.close()
    born.see([os.getpid()])

    assert os.listdir("/proc/self/fd") == before
    assert (born.has_exited, born.status()) == (False, ExitStatus())


async def test_a_cancelled_watch_leaves_no_descriptor_and_no_reader() -> None:
    pid, tell, identity = child(kill_itself)
    try:
        before = os.listdir("/proc/self/fd")
        watch = asyncio.create_task(ExitWatch().watch(identity))
        await asyncio.sleep(0)

        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)

        assert os.listdir("/proc/self/fd") == before
    finally:
        os.close(tell)
        os.waitpid(pid, 0)
