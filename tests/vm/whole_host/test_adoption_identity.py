"""Who a VMM is, how it ends, and whether it is shut in."""

import asyncio
import dataclasses
import os
import signal
from typing import Any

import pytest
from msgspec.structs import replace

from handlers.errors import Failure, HostFault, Unavailable
from handlers.host.vmm import vmms
from handlers.host.vmm.exit_watch import ExitWatch
from handlers.instance.vmm_log import LOG_TAIL_BYTES
from handlers.specs import LaunchSpec
from handlers.vmm_ends import ExitStatus, end_of
from schemas.records import VmmIdentity
from tests.vm import payload
from tests.vm.vmm_rig import UID, VmmRig


async def started(rig: VmmRig, code: bytes = payload.HALT) -> tuple[LaunchSpec, VmmIdentity]:
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)
    api = rig.vmms.api(spec.jail_id)
    await api.configure(rig.boot_config(spec, code))
    await api.start()
    await api.close()
    return spec, identity


async def test_sigterm_is_ignored_and_removal_does_not_depend_on_it(rig: VmmRig) -> None:
    spec, identity = await started(rig)

    os.kill(identity.pid, signal.SIGTERM)

    assert not await rig.vmms.wait_exit(identity, 0.05)
    await rig.vmms.remove(spec.jail_id)
    assert await rig.vmms.wait_exit(identity, 0)


async def test_an_identity_of_another_process_counts_as_exited(rig: VmmRig) -> None:
    _, identity = await started(rig)
    stale = replace(identity, start_ticks=identity.start_ticks - 1)

    assert not await rig.vmms.alive(stale)
    assert await rig.vmms.wait_exit(stale, 0)
    assert await rig.vmms.alive(identity)


async def test_a_vmm_killed_from_outside_is_noticed_within_a_second(rig: VmmRig) -> None:
    spec, identity = await started(rig)
    watch = asyncio.create_task(ExitWatch().watch(identity))
    await asyncio.sleep(0)

    await rig.vmms.remove(spec.jail_id)

    async with asyncio.timeout(1):
        assert await watch == ExitStatus(signal=signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "reason"),
    [(payload.RESET, "guest_shutdown"), (payload.CRASH, "guest_crash")],
    ids=["reset", "crash"],
)
async def test_a_guest_that_ends_by_itself_is_noticed_and_how(
    rig: VmmRig, code: bytes, reason: str
) -> None:
    spec, identity = await started(rig, code)

    async with asyncio.timeout(5):
        status = await ExitWatch().watch(identity)

    assert not await rig.vmms.alive(identity)
    assert status == ExitStatus(code=0)
    assert ended(rig, spec, status) == reason
    assert ended(rig, spec, ExitStatus()) == reason  # by the log alone


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGXFSZ])
async def test_a_signal_that_firecracker_catches_is_the_reason(
    rig: VmmRig, number: signal.Signals
) -> None:
    spec, identity = await started(rig)
    watch = asyncio.create_task(ExitWatch().watch(identity))
    await asyncio.sleep(0)

    os.kill(identity.pid, number)

    async with asyncio.timeout(5):
        status = await watch
    assert ended(rig, spec, status) == f"signal_{number.value}"
    assert ended(rig, spec, ExitStatus()) == f"signal_{number.value}"


async def test_a_snapshot_that_cannot_be_loaded_ends_the_vmm_with_its_code(rig: VmmRig) -> None:
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)
    watch = asyncio.create_task(ExitWatch().watch(identity))
    rig.put(spec, "state", b"no snapshot")
    rig.put(spec, "mem", b"no memory")
    api = rig.vmms.api(spec.jail_id)

    with pytest.raises(Failure):
        await api.load_snapshot("/state", "/mem")

    await api.close()
    async with asyncio.timeout(5):
        status = await watch
    assert status == ExitStatus(code=1)
    assert ended(rig, spec, status) == ended(rig, spec, ExitStatus()) == "code_1"


def ended(rig: VmmRig, spec: LaunchSpec, status: ExitStatus) -> str:
    log = (rig.root(spec) / "log").read_bytes()
    return end_of(status, None, log[-LOG_TAIL_BYTES:], launch=1, at_ms=1).reason


async def test_confinement_is_complete_only_once_the_vm_is_started(
    rig: VmmRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmms, "THREADS_TIMEOUT_S", 0.01)
    spec = await rig.prepare()
    identity = await rig.vmms.ensure(spec)

    with pytest.raises(HostFault, match=r"NoNewPrivs|Seccomp"):
        await rig.vmms.check_confinement(identity, spec)


@pytest.mark.parametrize(
    ("change", "fact"), [({"uid": UID + 1}, "uid"), ({"cgroup": "elsewhere"}, "cgroup")]
)
async def test_a_fact_that_does_not_hold_is_named(
    rig: VmmRig, change: dict[str, Any], fact: str
) -> None:
    spec, identity = await started(rig)

    with pytest.raises(HostFault) as failure:
        await rig.vmms.check_confinement(identity, dataclasses.replace(spec, **change))

    assert failure.value.detail["fact"] == fact


async def test_another_jails_root_is_named(rig: VmmRig) -> None:
    spec, identity = await started(rig)
    other = await rig.prepare(UID + 1)

    with pytest.raises(HostFault, match="root"):
        await rig.vmms.check_confinement(identity, LaunchSpec(other.jail_id, spec.uid, spec.cgroup))


async def test_the_confinement_of_a_vmm_that_is_gone_is_unavailable(rig: VmmRig) -> None:
    spec, identity = await started(rig)
    await rig.vmms.remove(spec.jail_id)

    with pytest.raises(Unavailable):
        await rig.vmms.check_confinement(identity, spec)
