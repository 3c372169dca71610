"""An instance's whole life cycle with the Linux guest, through the worker of a production host.

It runs once, in order, and records observations; each test checks one guarantee. The worker is
killed while the VM runs and restarted while it sleeps.
"""

import asyncio
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from handlers.host.storage.tenant_writer import TenantWriter
from handlers.host.vmm.cgroups import CgroupTree
from tests.constants import DESTROY, REF, SLEEP, START, STOP, WAKE
from tests.guests import traffic
from tests.live_host import LiveHost, live_host
from worker.cli.seed import Seeded

MIB = 1 << 20
SECRETS = (b'{"token": "the first"}', b'{"token": "the second"}')
PAYLOAD = os.urandom(20_000)
CONFIG_FILE, SECRETS_FILE = "/mnt/config/config.json", "/mnt/secrets/secrets.json"


@dataclass
class Observation:
    """The running instance at one moment."""

    described: dict[str, Any]
    stat: dict[str, Any]
    clock_off_s: float
    config: str
    secrets: str
    answers: dict[str, object]


@dataclass
class Life:
    """All observations. `replies` by command, `seen` by moment, `limits` of the cgroup."""

    overhead_mib: int = 0
    slept_s: float = 0.0
    replies: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    seen: dict[str, Observation] = field(default_factory=dict[str, Observation])
    limits: dict[str, str] = field(default_factory=dict[str, str])
    cgroups: dict[str, str] = field(default_factory=dict[str, str])
    drives: list[str] = field(default_factory=list[str])
    owned: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])


async def live() -> Life:
    life = Life()
    async with live_host(guest="linux", production=True) as host:
        life.overhead_mib = host.settings.limits.vmm_overhead_mib
        life.owned["before"] = await host.inventory()
        seeded = host.seed(secrets=SECRETS[0])
        life.replies["ping"] = await host.ping()
        life.replies["net_up"] = await host.net_up(seeded)
        life.replies["start"] = await host.run(START)
        life.seen["started"] = await look(host, seeded)
        await look_outside(life, host)
        await host.kill_worker()
        await host.start_worker()
        life.seen["adopted"] = await look(host, seeded)
        life.replies["sleep"] = await host.run(SLEEP)
        asleep_from = time.monotonic()
        life.owned["asleep"] = await host.inventory()
        with TenantWriter(host.settings.paths.data, REF.tenant_id) as files:
            files.write("secrets.json", SECRETS[1], mode=0o600)
        assert await host.stop_worker() == 0
        await host.start_worker()
        life.slept_s = time.monotonic() - asleep_from
        life.replies["wake"] = await host.run(WAKE)
        life.seen["woken"] = await look(host, seeded)
        life.replies["stop"] = await host.run(STOP)
        life.replies["destroy"] = await host.run(DESTROY)
        life.replies["net_down"] = await host.net_down(seeded.net)
        assert await host.stop_worker() == 0
        life.owned["after"] = await host.inventory()
    return life


async def look(host: LiveHost, seeded: Seeded) -> Observation:
    stat = await host.stat()
    clock_off_s = stat["unix_nanos"] / 1e9 - time.time()
    address = seeded.guest_ip
    return Observation(
        described=await host.describe(),
        stat=stat,
        clock_off_s=clock_off_s,
        config=await read_file(host, CONFIG_FILE),
        secrets=await read_file(host, SECRETS_FILE),
        answers={
            "ping": await asyncio.to_thread(traffic.ping, address),
            "udp": await asyncio.to_thread(traffic.udp_echo, address, b"datagram"),
            "tcp": await asyncio.to_thread(traffic.tcp_echo, address, PAYLOAD),
        },
    )


async def read_file(host: LiveHost, path: str) -> str:
    answer = await host.ask_guest({"ReadFile": {"path": path}})
    content: str = answer["ReadFile"]["content"]
    return content.encode("latin-1").decode()


async def look_outside(life: Life, host: LiveHost) -> None:
    """The VMM according to the kernel."""
    pid = life.replies["start"]["detail"]["pid"]
    tree = CgroupTree.of(host.settings)
    name = tree.name(REF.tenant_id, (await host.describe())["jail_id"])
    leaf = Path(tree.path(name))
    for limit in ("memory.max", "memory.swap.max", "cpu.max", "pids.max"):
        life.limits[limit] = (leaf / limit).read_text().strip()
    life.cgroups = {"asked": f"0::/{name}", "is": Path(f"/proc/{pid}/cgroup").read_text().strip()}
    life.drives = [drive["label"] for drive in (await host.ask_guest("Drives"))["Drives"]]
    life.owned["running"] = await host.inventory()


@pytest.fixture(scope="module")
def life() -> Life:
    return asyncio.run(asyncio.wait_for(live(), 240))


def test_every_command_does_its_work_and_leaves_nothing_behind(life: Life) -> None:
    seen: dict[str, tuple[str, list[str]]] = {
        what: (reply["code"], reply["left_behind"]) for what, reply in life.replies.items()
    }

    assert set(seen) == set(life.replies)
    assert all(told == ("ok", []) for told in seen.values()), seen
    assert life.replies["ping"]["detail"]["limits_enforced"] is True


def test_limits_are_enforced(life: Life) -> None:
    assert life.limits == {
        "memory.max": str((128 + life.overhead_mib) * MIB),
        "memory.swap.max": "0",
        "cpu.max": "100000 100000",
        "pids.max": "64",
    }
    assert life.cgroups["is"] == life.cgroups["asked"]


def test_the_guest_finds_its_drives_by_label_with_their_content(life: Life) -> None:
    look = life.seen["started"]
    config = json.loads(look.config)

    assert life.drives == ["linux-root", "mvm-config", "mvm-data", "mvm-secrets"]
    assert (config["tenant_id"], config["pool_id"], config["instance_id"]) == (
        REF.tenant_id,
        REF.pool_id,
        REF.instance_id,
    )
    assert (config["vcpus"], config["mem_mib"]) == (1, 128)
    assert look.secrets.encode() == SECRETS[0]
    assert look.stat["mounted"] == ["config", "secrets", "data"]


@pytest.mark.parametrize("when", ["started", "adopted", "woken"])
def test_traffic_flows(life: Life, when: str) -> None:
    assert life.seen[when].answers == {"ping": True, "udp": b"datagram", "tcp": PAYLOAD}


def test_a_killed_worker_finds_its_vm_again(life: Life) -> None:
    before, after = life.seen["started"], life.seen["adopted"]

    assert after.described["status"] == "running"
    assert after.described["jail_id"] == before.described["jail_id"]
    assert after.stat["boot_id"] == before.stat["boot_id"]
    assert after.stat["counter"] > before.stat["counter"]
    assert life.replies["sleep"]["changed"] is True


def test_sleep_drains_the_guest_and_keeps_only_the_snapshot(life: Life) -> None:
    reply = life.replies["sleep"]
    owned = {kind for kind, count in life.owned["asleep"].items() if count}

    assert (reply["status"], reply["detail"]["drain"]) == ("sleeping", "acknowledged")
    assert reply["detail"]["size_bytes"] > 128 * MIB
    assert "snapshots" in owned
    assert not owned & {"processes", "taps", "cgroups", "jails", "sockets", "disks", "temp"}


def test_the_woken_guest_is_the_one_that_slept(life: Life) -> None:
    before, after = life.seen["adopted"].stat, life.seen["woken"].stat
    started, woken = life.replies["start"]["detail"], life.replies["wake"]["detail"]

    assert after["counter"] > before["counter"]
    assert after["boot_id"] == before["boot_id"]
    assert (after["boots"], after["drains"]) == (1, 1)
    assert after["wakes"] >= 1  # sent again where the first answer was slow
    assert woken["pid"] != started["pid"]
    assert (started["launch"], woken["launch"]) == (1, 2)


def test_the_clock_is_right_after_seconds_asleep(life: Life) -> None:
    detail = life.replies["wake"]["detail"]

    assert life.slept_s > 2
    assert abs(life.seen["woken"].clock_off_s) < 1
    assert isinstance(detail["clock_was_off_s"], float)
    assert not [name for name in detail if name.endswith("_failed")]


def test_the_woken_guest_gets_new_small_drives(life: Life) -> None:
    before, after = life.seen["adopted"], life.seen["woken"]

    assert before.secrets.encode() == SECRETS[0]
    assert after.secrets.encode() == SECRETS[1]
    assert after.config == before.config
    assert after.stat["mounted"] == ["config", "secrets", "data"]


def test_the_guest_ends_by_itself_when_asked_to_stop(life: Life) -> None:
    assert life.replies["stop"]["detail"]["method"] == "graceful"
    assert life.replies["stop"]["status"] == "stopped"


def test_the_inventory_is_the_same_before_and_after(life: Life) -> None:
    running = life.owned["running"]

    assert life.owned["after"] == life.owned["before"]
    for kind in ("bridges", "jails", "nft", "sockets", "disks"):
        assert running[kind] > 0, kind
    # One, though KVM puts a kernel thread of its own into the VMM's cgroup.
    assert (running["processes"], running["taps"], running["cgroups"]) == (1, 1, 1)
