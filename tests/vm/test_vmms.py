"""A launch through the jailer: what it makes, what it proves, what remains when it fails."""

import asyncio
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import msgspec
import pytest

from handlers.errors import Conflict, Failure, HostFault, Invalid, Unavailable
from handlers.host.vmm.jailer import Jailer
from handlers.host.vmm.vmms import Vmms
from handlers.specs import LaunchSpec, NicConfig
from tests.vm import payload
from tests.vm.vmm_rig import MAC, UID, VmmRig, add_tap


def launches(rig: VmmRig) -> list[str]:
    """Jail ids of all jailer executions, oldest first."""
    log = Path(rig.settings.paths.state, "launches.log")
    return [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []


def vmms_with(rig: VmmRig, **changes: object) -> Vmms:
    """The same host with other `[vmm]` settings."""
    vmm = msgspec.structs.replace(rig.settings.vmm, **changes)
    return Vmms(msgspec.structs.replace(rig.settings, vmm=vmm))


def stand_in(rig: VmmRig, code: bytes) -> str:
    """A misbehaving program in place of Firecracker."""
    directory = rig.directory / "stand-in"
    directory.mkdir()
    return str(payload.write(directory / "firecracker", code))


async def until_started(rig: VmmRig, spec: LaunchSpec) -> None:
    async with asyncio.timeout(10):
        while not (rig.root(spec) / "firecracker.pid").exists():
            await asyncio.sleep(0.001)


def held(pids: list[int]) -> bool:
    """Whether the launch has seen its one process: it has a pidfd of it."""
    found: set[str] = set()
    for fd in os.listdir("/proc/self/fdinfo"):
        with contextlib.suppress(FileNotFoundError):
            found |= set(Path("/proc/self/fdinfo", fd).read_text().splitlines())
    return len(pids) == 1 and f"Pid:\t{pids[0]}" in found


def has_vm(pid: int) -> bool:
    """Whether KVM has created a VM for the process. Source: KVM_CREATE_VM of kvm/api.rst."""
    links = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    return "anon_inode:kvm-vm" in links


def left(rig: VmmRig, spec: LaunchSpec) -> list[str]:
    """Names in the jail's root."""
    return sorted(os.listdir(rig.root(spec)))


# -- success ---------------------------------------------------------------------------------------


async def test_a_launched_vmm_runs_in_its_cgroup_and_its_api_listens(rig: VmmRig) -> None:
    spec = await rig.prepare()

    identity = await rig.vmms.ensure(spec)

    assert identity.cgroup == spec.cgroup
    assert rig.tree.pids(spec.cgroup) == [identity.pid]
    assert await rig.vmms.alive(identity)
    api = rig.vmms.api(spec.jail_id)
    assert await api.state() == "Not started"
    await api.close()


async def test_a_started_vmm_is_confined_and_its_removal_leaves_no_process(rig: VmmRig) -> None:
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)
    api = rig.vmms.api(spec.jail_id)
    await api.configure(rig.boot_config(spec, payload.HALT))
    await api.start()
    await api.close()

    await rig.vmms.check_confinement(identity, spec)
    limits = Path(f"/proc/{identity.pid}/limits").read_text()
    size = str(rig.settings.vmm.max_file_mib << 20)
    assert re.search(rf"^Max file size +{size} +{size} ", limits, re.MULTILINE)
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    await rig.vmms.remove(spec.jail_id)
    await rig.vmms.remove(spec.jail_id)

    assert not await rig.vmms.alive(identity)
    assert not await rig.vmms.exists(spec.jail_id)
    assert await rig.vmms.find(spec.jail_id) is None


async def test_kvm_creates_the_vm_in_the_step_start_vm(rig: VmmRig) -> None:
    """So that step's duration is where a slow creation by KVM is seen."""
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)
    add_tap("tap0", UID)
    seen = [has_vm(identity.pid)]
    api = rig.vmms.api(spec.jail_id)

    await api.configure(rig.boot_config(spec, payload.HALT))
    seen.append(has_vm(identity.pid))
    await api.start()
    seen.append(has_vm(identity.pid))
    await api.close()

    assert seen == [False, False, True]


async def test_another_worker_finds_the_same_vmm_and_launches_no_second(rig: VmmRig) -> None:
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)

    restarted = Vmms(rig.settings)
    knowing = Vmms(rig.settings, tenant_of=lambda jail_id: spec.cgroup.split("/")[-2])

    assert await restarted.find(spec.jail_id) == identity
    assert await knowing.find(spec.jail_id) == identity
    assert await restarted.ensure(spec) == identity
    assert launches(rig) == [spec.jail_id]


async def test_concurrent_launches_are_independent(rig: VmmRig) -> None:
    specs = [await rig.prepare(UID + number) for number in range(6)]

    identities = await asyncio.gather(*(rig.vmms.ensure(spec) for spec in specs))

    assert len({identity.pid for identity in identities}) == 6
    assert [identity.cgroup for identity in identities] == [spec.cgroup for spec in specs]
    await asyncio.gather(*(rig.vmms.remove(spec.jail_id) for spec in specs))
    assert not any([await rig.vmms.exists(spec.jail_id) for spec in specs])


async def test_a_jail_whose_vmm_died_is_launched_again(rig: VmmRig) -> None:
    spec = await rig.prepare()
    first = await rig.vmms.ensure(spec)
    await rig.vmms.remove(spec.jail_id)

    second = await rig.vmms.ensure(spec)

    assert second.pid != first.pid
    assert launches(rig) == [spec.jail_id] * 2


async def test_a_jail_path_longer_than_sun_path_works(rig: VmmRig) -> None:
    deep = rig.directory / ("d" * 100)
    settings = msgspec.structs.replace(
        rig.settings, vmm=msgspec.structs.replace(rig.settings.vmm, jail_base=str(deep))
    )
    rig.settings = settings
    rig.vmms = Vmms(settings)
    spec = await rig.prepare()

    await rig.vmms.ensure(spec)

    api = rig.vmms.api(spec.jail_id)
    assert await api.state() == "Not started"
    await api.close()


async def test_the_launch_log_is_root_only_and_bounded(rig: VmmRig) -> None:
    log = Path(rig.settings.paths.state, "launches.log")
    log.write_bytes(b"0 old 0\n" * 131_072)
    spec = await rig.prepare()

    await rig.vmms.ensure(spec)

    assert not log.exists()
    assert log.with_suffix(".log.1").read_text().splitlines()[-1].split()[1] == spec.jail_id


# -- failure ---------------------------------------------------------------------------------------


async def test_without_its_cgroup_nothing_is_started(rig: VmmRig) -> None:
    spec = await rig.prepare()
    elsewhere = LaunchSpec(spec.jail_id, spec.uid, f"{rig.tree.base}/acme/missing")

    with pytest.raises(HostFault, match="missing"):
        await rig.vmms.ensure(elsewhere)

    assert launches(rig) == []
    assert left(rig, spec) == ["log"]


async def test_without_its_log_nothing_is_started(rig: VmmRig) -> None:
    spec = await rig.prepare()
    (rig.root(spec) / "log").unlink()

    with pytest.raises(HostFault, match="no log file"):
        await rig.vmms.ensure(spec)

    assert launches(rig) == []


async def test_an_executable_of_another_name_is_refused_before_it_makes_another_layout(
    rig: VmmRig,
) -> None:
    spec = await rig.prepare()
    other = rig.directory / "firecracker-v1"
    shutil.copy(rig.settings.vmm.firecracker, other)

    with pytest.raises(HostFault, match="firecracker-v1"):
        await vmms_with(rig, firecracker=str(other)).ensure(spec)


async def test_a_missing_jailer_is_a_host_fault(rig: VmmRig) -> None:
    spec = await rig.prepare()

    with pytest.raises(HostFault, match="cannot execute /nope/jailer"):
        await vmms_with(rig, jailer="/nope/jailer").ensure(spec)


async def test_the_jailers_output_is_reported_and_its_files_are_removed(rig: VmmRig) -> None:
    spec = await rig.prepare()
    missing = str(rig.directory / "firecracker")

    with pytest.raises(HostFault, match="No such file") as failure:
        await vmms_with(rig, firecracker=missing).ensure(spec)

    assert failure.value.detail["exit_code"] != 0
    assert left(rig, spec) == ["log"]


async def test_a_vmm_that_exits_during_startup_is_reported_with_the_end_of_its_log(
    rig: VmmRig,
) -> None:
    spec = await rig.prepare()
    rig.put(spec, "log", b"x" * 10_000 + b"the last words")

    with pytest.raises(HostFault, match="exited during startup") as failure:
        await vmms_with(rig, firecracker=stand_in(rig, payload.EXIT_0)).ensure(spec)

    assert len(failure.value.detail["vmm_log"]) == 4096
    assert failure.value.detail["vmm_log"].endswith("the last words")
    assert left(rig, spec) == ["log"]


async def test_a_vmm_that_is_killed_from_outside_during_startup_is_not_the_hosts_fault(
    rig: VmmRig,
) -> None:
    spec = await rig.prepare()
    hanging = vmms_with(rig, firecracker=stand_in(rig, payload.WAIT), api_timeout_s=20)
    launch = asyncio.ensure_future(hanging.ensure(spec))
    await until_started(rig, spec)
    async with asyncio.timeout(20):
        while not held(pids := rig.tree.pids(spec.cgroup)):
            await asyncio.sleep(0.005)

    os.kill(pids[0], signal.SIGKILL)

    with pytest.raises(Unavailable, match="exited during startup: killed by SIGKILL") as failure:
        await launch
    assert failure.value.detail["vmm_end"]["reason"] == "signal_9"
    assert left(rig, spec) == ["log"]


async def test_an_api_that_never_listens_is_unavailable_and_its_process_is_killed(
    rig: VmmRig,
) -> None:
    spec = await rig.prepare()
    hanging = vmms_with(rig, firecracker=stand_in(rig, payload.WAIT), api_timeout_s=0.3)

    with pytest.raises(Unavailable, match="did not listen"):
        await hanging.ensure(spec)

    assert not await hanging.exists(spec.jail_id)
    assert left(rig, spec) == ["log"]


async def test_a_cancelled_launch_leaves_no_process(rig: VmmRig) -> None:
    spec = await rig.prepare()
    hanging = vmms_with(rig, firecracker=stand_in(rig, payload.WAIT))
    launch = asyncio.create_task(hanging.ensure(spec))
    await until_started(rig, spec)

    launch.cancel()
    await asyncio.sleep(0)
    launch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launch

    assert not await hanging.exists(spec.jail_id)
    assert left(rig, spec) == ["log"]


async def test_a_launch_that_a_killed_worker_left_incomplete_is_repeated(rig: VmmRig) -> None:
    """The process is in the cgroup but never made its API: it must not be found as a VMM."""
    spec = await rig.prepare()
    with open(os.devnull, "wb") as output:
        settings = msgspec.structs.replace(
            rig.settings.vmm, firecracker=stand_in(rig, payload.WAIT)
        )
        jailer = Jailer(msgspec.structs.replace(rig.settings, vmm=settings))
        await jailer.run(spec, str(rig.root(spec)), output.fileno())
    await until_started(rig, spec)
    stuck = rig.tree.pids(spec.cgroup)

    identity = await rig.vmms.ensure(spec)

    assert stuck
    assert identity.pid not in stuck
    assert set(rig.tree.pids(spec.cgroup)).isdisjoint(stuck)


async def test_an_api_that_another_process_serves_is_refused(rig: VmmRig) -> None:
    spec = await rig.prepare()
    hanging = vmms_with(rig, firecracker=stand_in(rig, payload.WAIT))
    launch = asyncio.create_task(hanging.ensure(spec))
    await until_started(rig, spec)
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(str(rig.directory / "s"))
        impostor.listen()
        (rig.directory / "s").rename(rig.root(spec) / "api.sock")

        with pytest.raises(HostFault, match="not served by the VMM"):
            await launch


async def test_a_vmm_of_another_uid_is_a_conflict(rig: VmmRig) -> None:
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)

    with pytest.raises(Conflict, match=str(UID)):
        await rig.vmms.ensure(LaunchSpec(spec.jail_id, UID + 1, spec.cgroup))

    assert await rig.vmms.alive(identity)


async def test_a_foreign_process_in_the_leaf_is_named_and_not_killed(rig: VmmRig) -> None:
    spec = await rig.prepare()
    with subprocess.Popen(["sleep", "30"]) as foreign:
        procs = Path(rig.tree.path(spec.cgroup), "cgroup.procs")
        procs.write_text(str(foreign.pid))
        try:
            with pytest.raises(HostFault, match=f"unexpected process {foreign.pid} .* not killed"):
                await rig.vmms.remove(spec.jail_id)

            assert await rig.vmms.find(spec.jail_id) is None
            assert foreign.poll() is None
        finally:
            foreign.kill()


async def test_a_vmm_whose_jail_was_moved_away_is_not_found_but_still_removed(rig: VmmRig) -> None:
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)
    rig.root(spec).rename(rig.directory / "taken")

    assert await rig.vmms.find(spec.jail_id) is None
    assert await rig.vmms.exists(spec.jail_id)
    await rig.vmms.remove(spec.jail_id)

    assert not await rig.vmms.alive(identity)


@pytest.mark.parametrize("jail_id", ["", "..", "a/b", "A", "é", "a_b", "a" * 65])
async def test_an_invalid_jail_id_is_refused(rig: VmmRig, jail_id: str) -> None:
    with pytest.raises(Invalid):
        await rig.vmms.find(jail_id)


# -- the TAP ---------------------------------------------------------------------------------------


async def test_a_vmm_gets_only_the_tap_of_its_own_uid(rig: VmmRig) -> None:
    add_tap("tn1i4", UID + 1)
    spec = await rig.prepare()
    await rig.vmms.ensure(spec)
    config = rig.boot_config(spec, payload.HALT)

    for other in ("tn1i4", "nosuch"):
        api = rig.vmms.api(spec.jail_id)
        with pytest.raises(Failure) as refused:
            await api.configure(dataclasses.replace(config, nic=NicConfig(other, MAC)))
        assert refused.value.detail["errno"] == "EPERM"
        await api.close()
