"""The state of a host that each page of docs/runbooks begins with, made for real.

A fault is an asynchronous context manager that takes a directory for files of its own and yields
the operator of a host in that state.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

from handlers.host.vmm.cgroups import find_mount
from schemas.requests import InstanceRef, SleepInstance, StartInstance, StopInstance, WakeInstance
from tests.constants import REF, SLEEP, START, STOP
from tests.crash.kills import until, wait_event
from tests.guests.firecracker import PINNED, relabelled
from tests.live_host import LiveHost, live_host
from tests.vm.runbooks.forbidden_call import make_forbidden_call
from tests.vm.runbooks.operator import Operator, operator_of
from tests.vm.whole_host.test_full_disk import fill, fill_to, wait_state
from worker.failpoints import ARM, FILE, POINT

Fault = Callable[[Path], AbstractAsyncContextManager[Operator]]
FAULTS: Final[dict[str, Fault]] = {}
HURRIED: Final = "tests.vm.runbooks.hurried"
BAD, OLDER = "1.12.9", "1.12.0"
PROGRAMS: Final = ("firecracker", "jailer")


def fault(page: str) -> Callable[[Callable[[Path], AsyncGenerator[Operator]]], Fault]:
    """Register it for a page."""

    def add(make: Callable[[Path], AsyncGenerator[Operator]]) -> Fault:
        FAULTS[page] = contextlib.asynccontextmanager(make)
        return FAULTS[page]

    return add


@contextlib.asynccontextmanager
async def host_with_operator(
    worker: Mapping[str, str | None] | None = None,
    words: Mapping[str, str] | None = None,
    *,
    module: str = "worker",
    running: bool = True,
    **options: Any,
) -> AsyncGenerator[tuple[LiveHost, Operator]]:
    """A ready host, with acme/web/i-1 running if so wanted; options are those of `live_host`."""
    async with (
        live_host(worker=False, **options) as host,
        operator_of(host, worker, words, module=module) as operator,
    ):
        await operator.start_worker()
        seeded = host.seed()
        assert (await host.net_up(seeded))["code"] == "ok"
        if running:
            started = await host.run(START)
            assert started["code"] == "ok", started
        yield host, operator


def named(name: str) -> tuple[str, str, str]:
    return ("acme", "web", name)


# -- the worker and the bus --------------------------------------------------------------------


@fault("HostdDown")
async def worker_does_not_start(_: Path) -> AsyncGenerator[Operator]:
    async with live_host(worker=False) as host, operator_of(host) as operator:
        Path(host.directory, "hostd.toml").write_text("[log]\nverbose = true\n")
        await operator.start_worker(ready=False)
        assert host.worker is not None
        assert await asyncio.wait_for(host.worker.wait(), 30) != 0
        yield operator


@fault("HostdBusDisconnected")
async def nats_is_away(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator(running=False) as (host, operator):
        await host.nats.stop()
        await until(lambda: "bus.disconnected" in host.log(), "the loss of the bus")
        yield operator


@fault("HostdNotReady")
async def streams_are_lost(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator(running=False) as (host, operator):
        await host.nats.stop()
        shutil.rmtree(f"{host.nats.directory}/jetstream")
        await host.nats.start()
        await until(lambda: "bus.not_provisioned" in host.log(), "the report")
        yield operator


@fault("HostdOutboxBacklog")
async def rows_wait_for_nats(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator() as (host, operator):
        (pid,) = host.vm_pids()
        await host.nats.stop()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: "vmm.exited" in host.log(), "the end of the VMM")
        yield operator


@fault("HostdBusPermissionDenied")
async def nats_denies_events(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator() as (host, operator):
        await host.nats.stop()
        host.nats.configure(
            "no_auth_user: live\n"
            "authorization { users: [ { user: live, password: host\n"
            f' permissions: {{ publish: {{ deny: [\n"{host.settings.root}.*.evt.>"\n] }} }}\n'
            "} ] }"
        )
        await host.nats.start()
        (pid,) = host.vm_pids()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: "bus.permission_denied" in host.log(), "the denial")
        yield operator


@fault("HostdOutboxHeld")
async def nats_takes_small_messages_only(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator() as (host, operator):
        await host.nats.stop()
        (pid,) = host.vm_pids()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: "vmm.exited" in host.log(), "the end of the VMM")
        host.nats.configure("max_payload: 150")
        await host.nats.start()
        await until(lambda: "outbox.row_held" in host.log(), "a row that is held")
        yield operator


@fault("HostdCommandsStuck")
async def command_does_not_end(directory: Path) -> AsyncGenerator[Operator]:
    reached, armed = directory / "reached", directory / "armed"
    variables: dict[str, str | None] = {POINT: "after:cgroup", FILE: str(reached), ARM: str(armed)}
    variables |= {"HOSTD_LIMITS_SHUTDOWN_S": "1"}
    async with host_with_operator(variables, running=False) as (host, operator):
        armed.touch()
        await host.publish(START, "stuck")
        await until(reached.exists, "the failpoint")
        armed.unlink()  # the next worker goes on
        yield operator


@fault("HostdJournalSlow")
async def host_at_work(_: Path) -> AsyncGenerator[Operator]:
    """No disk here is slow: the commands look, and take the host out of service and back."""
    async with host_with_operator() as (_host, operator):
        yield operator


@fault("HostdEventLoopLag")
async def worker_was_stopped(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator() as (host, operator):
        assert host.worker is not None
        host.worker.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{host.worker.pid}/stat")
        await until(lambda: stat.read_text().split(") ")[1][0] == "T", "the stop")
        host.worker.send_signal(signal.SIGCONT)
        yield operator


@fault("HostdQuarantinedRows")
async def row_of_another_version(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator() as (host, operator):
        assert (await host.run(STOP))["code"] == "ok"
        await host.stop_worker()
        path = f"{host.settings.paths.state}/journal.db"
        with contextlib.closing(sqlite3.connect(path)) as journal, journal:
            done = journal.execute(
                "UPDATE instance SET record = CAST(replace(CAST(record AS TEXT), "
                "'\"stopped\"', '\"dreaming\"') AS BLOB)"
            )
            assert done.rowcount == 1
        await operator.start_worker(ready=False)
        await host.wait_ready()
        yield operator


@fault("lost-journal")
async def journal_is_lost(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator() as (host, operator):
        for name in ("i-2", "i-3"):
            host.seed(InstanceRef(*named(name)))
            assert (await host.run(StartInstance(*named(name))))["code"] == "ok"
        asleep = await host.run(SleepInstance(*named("i-2"), force=False))
        assert asleep["code"] == "ok"
        assert (await host.run(StopInstance(*named("i-3"))))["code"] == "ok"
        await host.kill_worker()
        for path in Path(host.settings.paths.state).glob("journal.db*"):
            path.unlink()
        yield operator


# -- the disk ----------------------------------------------------------------------------------


@fault("HostdDiskFull")
async def disk_is_full(_: Path) -> AsyncGenerator[Operator]:
    words = {"forgotten.tar": "filler"}
    async with host_with_operator(words=words, disk_mib=256) as (host, operator):
        fill(host)
        await wait_state(host, "degraded")
        yield operator


@fault("HostdDiskAboveWatermark")
async def disk_is_above_the_watermark(_: Path) -> AsyncGenerator[Operator]:
    words = {"forgotten.tar": "filler"}
    disk: dict[str, Any] = {"disk_mib": 640, "disk_high_percent": 70.0, "disk_low_percent": 60.0}
    async with host_with_operator(words=words, running=False, **disk) as (host, operator):
        fill_to(host, percent=75)
        await wait_state(host, "degraded")
        yield operator


# -- VMMs --------------------------------------------------------------------------------------


async def ended(end: Callable[[int], None]) -> AsyncGenerator[Operator]:
    """The VMM of i-1 was ended by what is done to its process."""
    async with host_with_operator() as (host, operator):
        (pid,) = host.vm_pids()
        end(pid)
        await wait_event(host, lambda event: event["kind"] == "vmm_exited")
        await host.wait_status("failed")
        yield operator


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@fault("HostdVmmCrashes")
def vmm_is_killed(_: Path) -> AsyncGenerator[Operator]:
    return ended(kill)


@fault("HostdVmmOutOfMemory")
def vmm_is_killed_as_by_an_oom_killer(_: Path) -> AsyncGenerator[Operator]:
    """Where the memory controller is absent no limit can be reached: see tests/lab/inside."""
    return ended(kill)


@fault("HostdVmmForbiddenSystemCall")
def vmm_makes_a_forbidden_call(_: Path) -> AsyncGenerator[Operator]:
    return ended(make_forbidden_call)


@fault("HostdVmmHung")
async def vmm_hangs(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator({"HOSTD_VMM_PROBE_INTERVAL_S": "1"}) as (host, operator):
        (pid,) = host.vm_pids()
        os.kill(pid, signal.SIGSTOP)
        try:
            await wait_event(host, lambda event: event["kind"] == "vmm_hung")
            yield operator
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@fault("HostdUnrecordedVmms")
async def vmm_without_a_record(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator(module=HURRIED) as (host, operator):
        assert (await operator.type("hostd release acme web i-1"))[0] == 0
        await until(lambda: "vmm.unrecorded" in host.log(), "the report")
        yield operator


@fault("HostdCapacityLow")
async def all_uids_are_taken(_: Path) -> AsyncGenerator[Operator]:
    # Not the default's first one, which a VMM of another test run may have.
    only = {"HOSTD_VMM_UID_BASE": f"{2_000_100_000 + os.getpid()}", "HOSTD_VMM_UID_COUNT": "1"}
    async with host_with_operator(only) as (_host, operator):
        yield operator


@fault("unknown-instance")
async def vmm_is_in_another_cgroup(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator() as (host, operator):
        (pid,) = host.vm_pids()
        elsewhere = Path(find_mount(), host.settings.limits.cgroup, "acme", "elsewhere")
        elsewhere.mkdir()
        await host.kill_worker()
        (elsewhere / "cgroup.procs").write_text(str(pid))
        await operator.start_worker()
        yield operator
        await until(lambda: emptied(elsewhere), "the end of its threads")


def emptied(cgroup: Path) -> bool:
    """Remove it; a kernel thread of KVM leaves it a moment after its VM."""
    try:
        cgroup.rmdir()
    except OSError:
        return False
    return True


@fault("HostdLostResources")
async def tap_is_removed(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator(module=HURRIED) as (host, operator):
        subprocess.run(["ip", "link", "delete", "tn7i3"], check=True)
        await wait_event(host, lambda event: event["kind"] == "drift" and event["detail"]["lost"])
        yield operator


@fault("HostdHostFault")
async def snapshot_is_damaged(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator() as (host, operator):
        assert (await host.run(SLEEP))["code"] == "ok"
        (memory,) = Path(host.settings.paths.state).glob("snapshots/**/mem")
        os.truncate(memory, 4096)
        refused = await host.run(WakeInstance(*named(REF.instance_id)))
        assert refused["code"] == "host_fault", refused
        yield operator


# -- versions of Firecracker -------------------------------------------------------------------


def add_bad_version(versions: Path) -> None:
    """A pair that says its version and does nothing else."""
    for program, name in (("firecracker", "Firecracker"), ("jailer", "Jailer")):
        bad = versions / f"{program}-v{BAD}"
        bad.write_text(f"#!/bin/sh\necho {name} v{BAD}\n")
        bad.chmod(0o755)


@contextlib.asynccontextmanager
async def host_of_versions(
    directory: Path, good: str, **variables: str | None
) -> AsyncGenerator[tuple[LiveHost, Operator, Path]]:
    """i-1 sleeps by the good version, the only one so far."""
    versions = directory / "versions"
    relabelled(versions, good)
    words = {"/opt/firecracker": str(versions), "1.16.1": good, "1.16.2": BAD}
    environment = {"HOSTD_VMM_VERSION": None, **variables}
    async with host_with_operator(
        environment, words, module=HURRIED, versions_dir=str(versions)
    ) as (host, operator):
        host.seed(InstanceRef(*named("i-2")), offset=6)
        assert (await host.run(SLEEP))["code"] == "ok"
        yield host, operator, versions


@fault("bad-firecracker")
async def newest_version_does_not_work(directory: Path) -> AsyncGenerator[Operator]:
    async with host_of_versions(directory, PINNED) as (_host, operator, versions):
        add_bad_version(versions)
        await operator.type("systemctl reload hostd")
        yield operator


@fault("HostdLaunchesQuarantined")
async def launches_keep_failing(directory: Path) -> AsyncGenerator[Operator]:
    once = {"HOSTD_LIMITS_QUARANTINE_AFTER": "1"}
    async with host_of_versions(directory, PINNED, **once) as (host, operator, versions):
        assert (await host.run(STOP))["code"] == "ok"
        add_bad_version(versions)
        await operator.type("systemctl reload hostd")
        failed = await host.run(StartInstance(*named("i-2")))
        assert failed["code"] == "host_fault", failed
        yield operator


@fault("HostdVmmVersionInTrouble")
async def version_in_use_is_removed(directory: Path) -> AsyncGenerator[Operator]:
    async with host_of_versions(directory, OLDER) as (host, operator, versions):
        release = Path(host.directory, "release")
        release.mkdir()
        for program in PROGRAMS:
            shutil.move(versions / f"{program}-v{OLDER}", release)
        relabelled(versions, PINNED)
        await operator.type("systemctl reload hostd")
        await wait_state(host, "degraded")
        yield operator


# -- what is made or changed beside hostd ------------------------------------------------------


@fault("HostdNetworkWarnings")
async def firewall_drops(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator(module=HURRIED) as (host, operator):
        chain = "{ type filter hook forward priority 0; policy drop; }"
        table = f"table ip filter {{ chain FORWARD {chain}; }}"
        subprocess.run(["nft", "-f", "-"], input=table, text=True, check=True)
        await wait_event(
            host, lambda event: event["kind"] == "network" and bool(event.get("reason"))
        )
        yield operator


def add_orphans(count: int) -> None:
    """Bridges with hostd's alias, of networks that no tenant has."""
    for number in range(90, 90 + count):
        name = f"br-tenant-{number}"
        subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
        subprocess.run(["ip", "link", "set", name, "alias", f"hostd:t{number}"], check=True)


@fault("HostdOrphans")
async def orphan(_: Path) -> AsyncGenerator[Operator]:
    async with host_with_operator(module=HURRIED) as (_host, operator):
        add_orphans(1)
        yield operator


@fault("HostdSweepStopped")
async def flood_of_orphans(_: Path) -> AsyncGenerator[Operator]:
    budget: dict[str, str | None] = {"HOSTD_SWEEP_PER_HOUR": "1", "HOSTD_SWEEP_GRACE_S": "0"}
    async with host_with_operator(budget, module=HURRIED) as (host, operator):
        add_orphans(6)
        await until(lambda: "sweep.stopped" in host.log(), "the end of the budget")
        yield operator


@fault("HostdHungCalls")
async def nftables_is_wedged(directory: Path) -> AsyncGenerator[Operator]:
    name = f"bad-{os.getpid()}"
    program = shutil.copy(shutil.which("sleep") or "", directory / name)
    words = {"bad-firewall": name}
    once = {"HOSTD_LIMITS_RETRY_BUDGET_S": "1", "HURRIED_CALLS": "1"}
    async with host_with_operator(once, words, module=HURRIED) as (host, operator):
        umbra = host.seed(InstanceRef("umbra", "web", "i-1"), net_id=8)
        holder = await asyncio.create_subprocess_exec(program, "600")
        try:
            Path(host.settings.paths.run, "wedge").write_text(str(holder.pid), encoding="ascii")
            hung = await host.net_up(umbra, "umbra")
            assert hung["code"] == "unavailable", hung
            yield operator
        finally:
            with contextlib.suppress(ProcessLookupError):
                holder.kill()
            await holder.wait()
