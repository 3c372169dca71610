"""A state directory that cannot be written does not end the worker, nor a VM."""

import asyncio
import contextlib
import json
import resource
import subprocess
from collections.abc import Generator
from typing import Any

from tests.constants import START, STOP
from tests.crash.test_watchdog import managed, start_vm
from tests.live_host import LiveHost, live_host
from worker.cli.control_client import ControlClient

PATIENCE_S = 60


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, timeout=10)


@contextlib.contextmanager
def read_only(state: str) -> Generator[None]:
    """A mount of its own over the state directory, read-only: the VMs' files are open below it."""
    mount("--bind", state, state)
    try:
        mount("-o", "remount,bind,ro", state)
        yield
    finally:
        subprocess.run(["umount", "-l", state], check=True, timeout=10)


async def reply(host: LiveHost, command_id: str) -> dict[str, Any]:
    """Once there is one: until the journal works, the command is in the stream alone."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := await host.replies(command_id)):
            await asyncio.sleep(0.05)
    (only,) = found
    return only


async def until_finding(host: LiveHost) -> dict[str, str]:
    """What `hostd doctor` gets of the worker, once it answers."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(Exception):
                answer = await asyncio.to_thread(ControlClient(host.settings).get, "/v1/doctor")
                return {str(key): str(value) for key, value in answer["findings"][0].items()}
            await asyncio.sleep(0.05)


async def test_a_worker_waits_for_its_state_directory_and_goes_on_by_itself() -> None:
    async with live_host(worker=False) as host:
        state = host.settings.paths.state
        await host.start_worker()
        boots, pids = await start_vm(host), host.vm_pids()
        await host.stop_worker()

        with managed(host) as manager, read_only(state):
            await host.start_worker(
                ready=False, environment={"NOTIFY_SOCKET": f"{host.directory}/notify"}
            )
            finding = await until_finding(host)
            await manager.until("READY=1")
            assert (finding["check"], finding["severity"]) == ("state_directory", "error")
            assert state in finding["what"]
            assert "Read-only" in finding["what"]
            await host.publish(STOP, "while-read-only")
            assert host.vm_pids() == pids
            assert host.worker is not None
            assert host.worker.returncode is None

            mount("-o", "remount,bind,rw", state)
            await host.wait_ready()
            assert (await reply(host, "while-read-only"))["code"] == "ok"
            await host.stop_worker()
        logged = [json.loads(line)["event"] for line in host.log().splitlines()]
        assert logged.count("state.unwritable") == 1
        assert logged.count("state.writable") == 1
        await host.start_worker()
        assert (await host.run(START))["code"] == "ok"
        assert (await host.stat())["boots"] == boots + 1


@contextlib.contextmanager
def io_errors(pid: int) -> Generator[None]:
    """Each write of the process to a file fails (EFBIG): to SQLite a disk I/O error."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


async def until_state(host: LiveHost, state: str) -> None:
    """Until the host says that it is in this state."""
    async with asyncio.timeout(PATIENCE_S), host.client() as client:
        while True:
            answer = await client.ask(host.settings.host.id, "status")
            if answer["host_state"] == state:
                return
            await asyncio.sleep(0.05)


async def test_a_worker_whose_disk_fails_meanwhile_answers_and_goes_on_by_itself() -> None:
    async with live_host(worker=False) as host:
        await host.start_worker(stdout=asyncio.subprocess.DEVNULL)
        await start_vm(host)
        pids = host.vm_pids()
        assert host.worker is not None

        with io_errors(host.worker.pid):
            await host.publish(STOP, "while-failing")
            await until_state(host, "degraded")
            doctor = await asyncio.to_thread(ControlClient(host.settings).get, "/v1/doctor")
            assert "the journal cannot commit" in str(doctor["findings"])
            dump = await asyncio.to_thread(ControlClient(host.settings).get, "/v1/dump")
            assert dump["host"]["degraded_by"] == ["journal"]
            assert dump["host"]["checks"]["can_commit"] is False
            assert host.vm_pids() == pids
            assert host.worker.returncode is None

        assert (await reply(host, "while-failing"))["code"] == "ok"
        await until_state(host, "ready")


async def test_a_worker_that_waits_ends_when_it_is_told_to() -> None:
    async with live_host(worker=False) as host:
        await host.start_worker()
        await host.stop_worker()
        with read_only(host.settings.paths.state):
            await host.start_worker(ready=False)
            await until_finding(host)

            assert await host.stop_worker() == 0
