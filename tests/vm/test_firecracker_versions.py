"""Several versions of Firecracker on one host: upgrade, way back, and files that go.

The two versions are one program under two numbers, so what is proven is which program is executed,
not that a snapshot of an older version loads into a newer one: hostd never tries that.
"""

import asyncio
import signal
from pathlib import Path

import pytest

from schemas import codec
from schemas.requests import InstanceRef, StartInstance
from schemas.subjects import Lane
from tests.constants import REF, SLEEP, START, STOP, WAKE
from tests.crash.kills import until
from tests.crash.test_warm_pool_kills import until_warm
from tests.guests.firecracker import PINNED, relabelled
from tests.live_host import LiveHost, live_host

OLDER, BAD = "1.12.0", "1.12.9"
OTHER = InstanceRef("acme", "web", "i-2")
START_OTHER = StartInstance(*(OTHER.tenant_id, OTHER.pool_id, OTHER.instance_id))
WAIT_S = 40


def executed(pid: int) -> str:
    """Which of the versions the process is."""
    program = Path(f"/proc/{pid}/exe").read_bytes()
    (found,) = [each for each in (OLDER, PINNED) if each.encode() in program]
    return found


async def told(host: LiveHost) -> list[str | None]:
    subject = host.subjects.event(Lane.host(), "vmm_versions")
    kept = await host.kept(f"HOSTD_EVT_{host.settings.host.cell}")
    return [codec.decode_event(data).reason for name, _, data in kept if name == subject]


async def reload(host: LiveHost) -> None:
    assert host.worker is not None
    before = host.log().count('"settings.reloaded"')
    host.worker.send_signal(signal.SIGHUP)
    await until(lambda: host.log().count('"settings.reloaded"') > before, "the reload")


async def until_degraded_by(host: LiveHost, *names: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await host.ping())["detail"]["degraded_by"] != list(names):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("warm_pool", [0, 1])
async def test_a_sleeper_of_an_older_version_wakes_after_the_default_changed(
    tmp_path: Path, warm_pool: int
) -> None:
    relabelled(tmp_path / "versions", OLDER)
    async with live_host(versions_dir=f"{tmp_path}/versions", warm_pool=warm_pool) as host:
        seeded = host.seed()
        host.seed(OTHER, offset=6)
        assert (await host.net_up(seeded))["code"] == "ok"
        assert executed((await host.run(START))["detail"]["pid"]) == OLDER
        before = await host.stat()
        assert (await host.run(SLEEP))["code"] == "ok"

        relabelled(tmp_path / "versions", PINNED)
        await reload(host)
        if warm_pool:
            await until_warm(host, 1)
        started = await host.run(START_OTHER)
        assert executed(started["detail"]["pid"]) == PINNED
        await host.kill_worker()
        await host.start_worker()
        woken = await host.run(WAKE)

        assert woken["code"] == "ok", woken
        assert executed(woken["detail"]["pid"]) == OLDER
        after = await host.stat()
        assert (after["boots"], after["counter"] > before["counter"]) == (1, True)
        assert (await host.describe(OTHER))["pid"] == started["detail"]["pid"]
        assert (await host.ping())["detail"]["vmm_versions"] == [
            {"version": OLDER, "state": "installed", "starts": False, "running": 1, "sleeping": 0},
            {"version": PINNED, "state": "installed", "starts": True, "running": 1, "sleeping": 0},
        ]
        for command in (SLEEP, WAKE, STOP, START):
            assert (await host.run(command))["code"] == "ok"
        assert executed((await host.describe(REF))["pid"]) == PINNED
        assert not [line for line in host.log().splitlines() if "warm_pool.vmm_lost" in line]


async def test_a_version_in_use_that_is_removed_is_announced_and_what_sleeps_by_it_wakes(
    tmp_path: Path,
) -> None:
    for version in (OLDER, PINNED):
        relabelled(tmp_path / "versions", version)
    async with live_host(versions_dir=f"{tmp_path}/versions", version=OLDER) as host:
        assert (await host.net_up(host.seed()))["code"] == "ok"
        for command in (START, SLEEP):
            assert (await host.run(command))["code"] == "ok"
        await host.stop_worker()
        for program in ("firecracker", "jailer"):
            (tmp_path / "versions" / f"{program}-v{OLDER}").unlink()

        await host.start_worker(ready=False, environment={"HOSTD_VMM_VERSION": None})
        await until_degraded_by(host, "vmm_versions")
        assert await told(host) == [f"Firecracker {OLDER} is removed"]
        woken = await host.run(WAKE)

        assert woken["code"] == "ok", woken
        assert executed(woken["detail"]["pid"]) == OLDER
        for then in (STOP, START):
            assert (await host.run(then))["code"] == "ok"
        await until_degraded_by(host)
        assert (await told(host))[1:] == ["all versions of Firecracker in use are installed"]


async def test_the_way_back_from_a_version_that_does_not_work(tmp_path: Path) -> None:
    """As docs/operations.md, "A bad version of Firecracker", has it."""
    versions, config = tmp_path / "versions", tmp_path / "hostd.toml"
    relabelled(versions, PINNED)
    config.write_text("")
    variables = {"HOSTD_CONFIG": str(config), "HOSTD_VMM_VERSION": None}
    async with live_host(worker=False, versions_dir=str(versions)) as host:
        await host.start_worker(environment=variables)
        assert (await host.net_up(host.seed()))["code"] == "ok"
        host.seed(OTHER, offset=6)
        for command in (START, SLEEP):
            assert (await host.run(command))["code"] == "ok"
        for program, name in (("firecracker", "Firecracker"), ("jailer", "Jailer")):
            bad = versions / f"{program}-v{BAD}"
            bad.write_text(f"#!/bin/sh\necho {name} v{BAD}\n")
            bad.chmod(0o755)
        await reload(host)
        failed = await host.run(START_OTHER)
        assert failed["code"] == "host_fault", failed
        assert (await host.run(WAKE))["code"] == "ok", "sleepers are not touched"

        config.write_text(f'[vmm]\nversion = "{PINNED}"\n')
        await reload(host)

        started = await host.run(START_OTHER)
        assert started["code"] == "ok", started
        assert executed(started["detail"]["pid"]) == PINNED
        for program in ("firecracker", "jailer"):
            (versions / f"{program}-v{BAD}").unlink()
        config.write_text("")
        await reload(host)
        assert (await host.run(SLEEP))["code"] == "ok"
        assert (await host.run(WAKE))["code"] == "ok"
        assert (await host.ping())["detail"]["degraded_by"] == []
