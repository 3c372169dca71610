"""What handlers rely on of VMM processes: jailed ones, and those of the host in memory.

A launch here is one jailer execution and the API listening; the guests are for `tests/vm`.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from handlers.errors import Conflict, Unavailable
from handlers.interfaces import Vmms
from handlers.specs import LaunchSpec
from tests.fakes import host as fake
from tests.guests.firecracker import FIRECRACKER
from tests.guests.namespace import own_network
from tests.vm.vmm_rig import vmm_rig

UID = 2_000_000_009
Prepare = Callable[[], Awaitable[LaunchSpec]]


@dataclass(frozen=True)
class VmmHost:
    """`prepare` makes what a launch needs: its jail and its cgroup leaf."""

    vmms: Vmms
    prepare: Prepare
    jailer_runs: Callable[[], list[str]]


@asynccontextmanager
async def real(directory: Path) -> AsyncGenerator[VmmHost]:
    with own_network():
        async with vmm_rig(directory) as made:

            def jailer_runs() -> list[str]:
                log = Path(made.settings.paths.state, "launches.log")
                lines = log.read_text().splitlines() if log.exists() else []
                return [line.split()[1] for line in lines]

            yield VmmHost(made.vmms, lambda: made.prepare(UID), jailer_runs)


@asynccontextmanager
async def in_memory(_dir: Path) -> AsyncGenerator[VmmHost]:
    machine = fake.FakeHost()
    numbers = itertools.count(1)

    async def prepare() -> LaunchSpec:
        jail_id = f"0123456789ab-{next(numbers)}"
        return LaunchSpec(jail_id, UID, f"hostd/acme/{jail_id}")

    yield VmmHost(fake.FakeVmms(machine), prepare, lambda: machine.jailer_runs)


HOSTS: dict[str, Callable[[Path], AbstractAsyncContextManager[VmmHost]]] = {
    "real": real,
    "fake": in_memory,
}


@pytest.fixture(params=HOSTS)
async def host(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[VmmHost]:
    assert FIRECRACKER.exists() or request.param == "fake", "make setup builds it"
    async with HOSTS[request.param](tmp_path) as made:
        yield made


async def test_a_vmm_is_launched_once_and_found_after(host: VmmHost) -> None:
    spec = await host.prepare()
    assert not await host.vmms.exists(spec.key)
    assert await host.vmms.find(spec.jail_id) is None

    identity = await host.vmms.ensure(spec)

    assert await host.vmms.ensure(spec) == identity
    assert host.jailer_runs() == [spec.jail_id]
    assert await host.vmms.exists(spec.key)
    assert await host.vmms.find(spec.jail_id) == identity
    assert await host.vmms.alive(identity)
    assert identity.cgroup == spec.cgroup


async def test_a_removed_vmm_is_gone_and_absent_is_success(host: VmmHost) -> None:
    spec = await host.prepare()
    await host.vmms.remove(spec.key)
    identity = await host.vmms.ensure(spec)

    for _twice in range(2):
        await host.vmms.remove(spec.key)

        assert not await host.vmms.exists(spec.key)
        assert await host.vmms.find(spec.jail_id) is None
        assert not await host.vmms.alive(identity)
        assert await host.vmms.wait_exit(identity, 0)


async def test_removing_one_vmm_leaves_the_others(host: VmmHost) -> None:
    first, second = await host.prepare(), await host.prepare()
    await host.vmms.ensure(first)
    stays = await host.vmms.ensure(second)

    await host.vmms.remove(first.key)

    assert await host.vmms.alive(stays)
    assert await host.vmms.find(second.jail_id) == stays


async def test_wait_exit_waits_until_the_exit_or_the_timeout(host: VmmHost) -> None:
    spec = await host.prepare()
    identity = await host.vmms.ensure(spec)
    assert not await host.vmms.wait_exit(identity, 0.05)

    waiting = asyncio.ensure_future(host.vmms.wait_exit(identity, float("inf")))
    await host.vmms.remove(spec.key)

    assert await asyncio.wait_for(waiting, 10)


async def test_an_identity_that_differs_is_not_alive(host: VmmHost) -> None:
    identity = await host.vmms.ensure(await host.prepare())

    for changed in ({"start_ticks": identity.start_ticks + 1}, {"boot_id": "another"}):
        assert not await host.vmms.alive(msgspec.structs.replace(identity, **changed))


async def test_a_vmm_of_another_uid_is_a_conflict(host: VmmHost) -> None:
    spec = await host.prepare()
    identity = await host.vmms.ensure(spec)

    with pytest.raises(Conflict):
        await host.vmms.ensure(replace(spec, uid=UID + 1))

    assert await host.vmms.alive(identity)


async def test_a_fresh_vmm_has_not_started_and_a_gone_one_has_no_api(host: VmmHost) -> None:
    spec = await host.prepare()
    await host.vmms.ensure(spec)
    api = host.vmms.api(spec.jail_id)
    try:
        assert await api.state() == "Not started"
        assert await api.version()
        await host.vmms.remove(spec.key)
        with pytest.raises(Unavailable):
            await api.state()
    finally:
        await api.close()
