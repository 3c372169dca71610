"""Limits with the real cgroup v2 controllers: enforced, read back, applied to a jailed VMM."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from handlers.errors import HostFault
from handlers.host.vmm.cgroups import CONTROLLERS, Cgroups
from handlers.specs import CgroupSpec, Restored
from handlers.vmm_ends import OomCounts
from schemas.settings import LimitSettings, Settings
from tests.guests.namespace import own_network
from tests.vm.vmm_rig import TAP, UID, VmmRig, add_tap, vmm_rig

MIB = 1024 * 1024
SPEC = CgroupSpec("acme", "a1-1", 32 * MIB + 1, 20_000, 8)
KEY = "acme/a1-1"


@pytest.fixture
def cgroups() -> Iterator[Cgroups]:
    made = Cgroups(Settings(limits=LimitSettings(cgroup=f"hostd-test-{os.getpid()}/vms")))
    base = made.tree.path(made.tree.base)
    yield made
    for path in (base, os.path.dirname(base)):
        if os.path.isdir(path):
            os.rmdir(path)


def value(cgroups: Cgroups, name: str) -> str:
    leaf = cgroups.tree.path(cgroups.tree.name("acme", "a1-1"))
    return Path(leaf, name).read_text().strip()


def run_inside(cgroups: Cgroups, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that enters the leaf first."""
    leaf = cgroups.tree.path(cgroups.tree.name("acme", "a1-1"))
    enter = f"import os; open('{leaf}/cgroup.procs', 'w').write(str(os.getpid())); "
    return subprocess.run(
        [sys.executable, "-c", enter + program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_limits_are_set_read_back_and_changed(cgroups: Cgroups) -> None:
    await cgroups.ensure(SPEC)
    await cgroups.ensure(SPEC)

    assert value(cgroups, "memory.max") == str(32 * MIB)
    assert value(cgroups, "memory.swap.max") == "0"
    assert value(cgroups, "cpu.max") == "20000 100000"
    assert value(cgroups, "pids.max") == "8"

    await cgroups.ensure(dataclasses.replace(SPEC, pids_max=9))
    assert value(cgroups, "pids.max") == "9"
    await cgroups.remove(KEY)
    assert not await cgroups.exists(KEY)


async def test_controllers_are_enabled_on_the_way_and_not_in_the_leaf(cgroups: Cgroups) -> None:
    await cgroups.ensure(SPEC)

    above = Path(cgroups.tree.path(f"{cgroups.tree.base}/acme"), "cgroup.subtree_control")
    assert set(CONTROLLERS) <= set(above.read_text().split())
    assert value(cgroups, "cgroup.subtree_control") == ""

    await cgroups.remove(KEY)


async def test_memory_past_the_limit_ends_the_process(cgroups: Cgroups) -> None:
    await cgroups.ensure(SPEC)

    before = await cgroups.oom_counts(KEY)

    outcome = run_inside(cgroups, "x = b'x' * (64 << 20); print(len(x))")

    assert (outcome.returncode, outcome.stdout) == (-9, "")
    assert before == OomCounts(limit_reached=0, killed=0)
    after = await cgroups.oom_counts(KEY)
    assert after is not None
    assert after.limit_reached >= 1
    assert after.killed == 1
    await cgroups.remove(KEY)
    assert await cgroups.oom_counts(KEY) is None


async def test_a_limit_above_the_leaf_that_kills_is_not_taken_for_the_leafs_own(
    cgroups: Cgroups,
) -> None:
    """As when the host's memory is used up: of the leaf, only the kill is counted."""
    await cgroups.ensure(SPEC)
    above = Path(cgroups.tree.path(f"{cgroups.tree.base}/acme"))
    (above / "memory.max").write_text(str(16 * MIB))
    (above / "memory.swap.max").write_text("0")

    outcome = run_inside(cgroups, "x = b'x' * (24 << 20); print(len(x))")

    assert (outcome.returncode, outcome.stdout) == (-9, "")
    assert await cgroups.oom_counts(KEY) == OomCounts(limit_reached=0, killed=1)
    await cgroups.remove(KEY)


async def test_processes_past_the_limit_are_refused(cgroups: Cgroups) -> None:
    await cgroups.ensure(SPEC)

    outcome = run_inside(
        cgroups,
        "import time\nfor n in range(20):\n try:\n  p = os.fork()\n"
        " except BlockingIOError: print(n); break\n if not p: time.sleep(1); os._exit(0)",
    )

    assert outcome.stdout == "7\n"
    await cgroups.remove(KEY)


async def test_a_base_that_holds_a_process_is_a_host_fault_and_nothing_is_left(
    cgroups: Cgroups,
) -> None:
    base = Path(cgroups.tree.path(cgroups.tree.base))
    base.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as inside:
        (base / "cgroup.procs").write_text(str(inside.pid))
        try:
            with pytest.raises(HostFault, match="contains processes"):
                await cgroups.ensure(SPEC)

            assert not (base / "acme").exists()
        finally:
            inside.kill()


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[VmmRig]:
    with own_network():
        add_tap(TAP, UID)
        async with vmm_rig(tmp_path, enforce=True) as made:
            yield made


async def test_a_jailed_vmm_boots_within_its_limits(host: VmmRig) -> None:
    spec = await host.prepare()
    identity = await host.vmms.ensure(spec)
    api = host.vmms.api(spec.jail_id)
    await api.configure(host.boot_config(spec))
    await api.start()
    await api.close()

    await host.vmms.check_confinement(identity, spec)
    await host.agents.ping(spec.jail_id, 5252, timeout_s=20)

    leaf = Path(host.tree.path(spec.cgroup))
    assert str(identity.pid) in (leaf / "cgroup.procs").read_text().split()
    assert int((leaf / "memory.current").read_text()) > 0
    assert (leaf / "memory.max").read_text().strip() == str(256 * MIB)
    assert await host.vmms.find(spec.jail_id) == identity

    await host.vmms.remove(spec.jail_id)

    assert not await host.vmms.exists(spec.jail_id)
    assert (leaf / "cgroup.procs").read_text() == ""
    # What it used is read only now.
    assert int((leaf / "memory.peak").read_text()) > MIB
    assert (leaf / "cpu.stat").read_text().startswith("usage_usec ")


async def test_changed_limits_of_a_leaf_are_named_and_restored(cgroups: Cgroups) -> None:
    await cgroups.ensure(SPEC)
    leaf = Path(cgroups.tree.path(cgroups.tree.name("acme", "a1-1")))
    assert await cgroups.differing([SPEC]) == {}
    before = {name: value(cgroups, name) for name in ("memory.max", "cpu.max", "pids.max")}
    for name in before:
        (leaf / name).write_text("max")

    assert await cgroups.differing([SPEC]) == {KEY: tuple(before)}
    restored = await cgroups.restore(SPEC)

    assert restored == Restored(tuple(before), ())
    assert {name: value(cgroups, name) for name in before} == before
    assert await cgroups.restore(SPEC) == Restored()
    await cgroups.remove(KEY)
    assert await cgroups.differing([SPEC]) == {}


async def test_a_memory_limit_that_would_kill_is_not_restored(cgroups: Cgroups) -> None:
    roomy = dataclasses.replace(SPEC, memory_max_bytes=128 * MIB)
    await cgroups.ensure(roomy)
    leaf = cgroups.tree.path(cgroups.tree.name("acme", "a1-1"))
    enter = f"import os; open('{leaf}/cgroup.procs', 'w').write(str(os.getpid())); "
    program = enter + "x = b'x' * (64 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as inside:
        assert inside.stdout is not None
        assert inside.stdout.readline() == b"\n"

        restored = await cgroups.restore(SPEC)

        assert restored.repaired == ()
        assert [name.split()[0] for name in restored.lost] == ["memory.max"]
        assert value(cgroups, "memory.max") == str(128 * MIB)
        assert inside.poll() is None
        inside.kill()
    await cgroups.remove(KEY)
