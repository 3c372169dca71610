"""From the previous release to this one and back, with VMs that run and sleep."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    Request,
    SleepInstance,
    StartInstance,
    WakeInstance,
)
from tests.live_host import LiveHost, live_host
from tests.previous_release import Release, built, previous_release
from tests.vm.control.local_cli import hostd
from worker.journal.migration.backup import backups

RUNS, SLEEPS, LATER = (InstanceRef("acme", "web", f"i-{n}") for n in (1, 2, 3))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return previous_release(str(tmp_path_factory.mktemp("previous")))


def names(ref: InstanceRef) -> tuple[str, str, str]:
    return ref.tenant_id, ref.pool_id, ref.instance_id


@asynccontextmanager
async def worker_of(host: LiveHost, release: Release | None, *, ends: str) -> AsyncGenerator[None]:
    """A worker of that release, or of this tree, that is stopped or killed at the end."""
    await host.start_worker(release=release)
    yield
    await (host.kill_worker() if ends == "killed" else host.stop_worker())


async def ok(host: LiveHost, request: Request, command_id: str | None = None) -> None:
    reply = await host.run(request, command_id)
    assert reply["code"] == "ok", reply


async def restore_backup(host: LiveHost) -> None:
    """As docs/operations.md has it, before the older version is installed."""
    (backup,) = backups(f"{host.settings.paths.state}/journal.db")
    answer = json.loads((await hostd(host, "journal", "restore", backup, "--json")).stdout)
    assert (answer["schema_version"], answer["stale"]) == (1, False)


@pytest.mark.parametrize(
    ("ends", "back"),
    [("stopped", "by the backup"), ("killed", "by the backup"), ("killed", "as it is")],
)
async def test_vms_outlive_an_upgrade_and_the_way_back(old: Release, ends: str, back: str) -> None:
    """The tables were only added to: the older one can also go on with them as they are."""
    start = StartInstance(*names(RUNS))
    async with live_host(worker=False) as host:
        clean = await host.inventory()
        for ref in (RUNS, SLEEPS, LATER):
            seeded = host.seed(ref)
        async with worker_of(host, old, ends=ends):
            await host.net_up(seeded)
            await ok(host, start, "started")
            await ok(host, StartInstance(*names(SLEEPS)))
            await ok(host, SleepInstance(*names(SLEEPS), force=False))
            first = await host.describe(RUNS)
            counter = (await host.stat(RUNS))["counter"]

        async with worker_of(host, None, ends=ends):
            assert await running_as(host, RUNS) == first["pid"]
            assert (await host.describe(SLEEPS))["status"] == "sleeping"
            assert (await host.run_again(start, "started"))["replayed"]
            await ok(host, WakeInstance(*names(SLEEPS)))
            await ok(host, SleepInstance(*names(SLEEPS), force=False))
            await ok(host, StartInstance(*names(LATER)))
            later = await host.describe(LATER)
        if back == "by the backup" and old.source.startswith("commit"):
            await restore_backup(host)

        async with worker_of(host, old, ends=ends):
            assert await running_as(host, RUNS) == first["pid"]
            assert await running_as(host, LATER) == later["pid"]
            assert (await host.run_again(start, "started"))["replayed"]
            await ok(host, WakeInstance(*names(SLEEPS)))
            for ref in (RUNS, SLEEPS, LATER):
                assert (await host.stat(ref))["boots"] == 1
            assert (await host.stat(RUNS))["counter"] > counter
            for ref in (RUNS, SLEEPS, LATER):
                await ok(host, DestroyInstance(*names(ref), wipe_volumes=True))
            await host.net_down(seeded.net)
        assert await host.inventory() == clean


async def running_as(host: LiveHost, ref: InstanceRef) -> int:
    found = await host.describe(ref)
    assert found["status"] == "running"
    return int(found["pid"])


def test_without_that_commit_this_tree_is_taken_and_the_run_says_so(tmp_path: Path) -> None:
    release = previous_release(str(tmp_path), "0" * 40)
    built.remove(release)

    assert release.source.startswith("this tree itself")
    assert "HOSTD_HOST_ID" in release.settings
