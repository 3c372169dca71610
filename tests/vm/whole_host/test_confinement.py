"""What a running guest can reach of the host and of other guests, and what reaches a disk."""

import contextlib
import json
import os
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Generator
from pathlib import Path

import pytest
import pytest_asyncio

from handlers.host.jail.layout import JailLayout
from schemas import naming
from schemas.requests import (
    DestroyInstance,
    InstanceRef,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from tests.kernel.net.frames import IPV4, ethernet, udp
from tests.kernel.net.netns import ETH_P_ALL, Sniffer
from tests.live_host import LiveHost
from tests.vm.whole_host import traffic
from worker.cli.seed import Seeded

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKEN = b"a secret that is nowhere else 7d1f"
ONE, TWO = InstanceRef("acme", "web", "one"), InstanceRef("acme", "web", "two")
OTHER = InstanceRef("umbra", "web", "other")


def names(ref: InstanceRef) -> tuple[str, str, str]:
    return (ref.tenant_id, ref.pool_id, ref.instance_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seeds(host: LiveHost) -> AsyncIterator[dict[InstanceRef, Seeded]]:
    """Two running guests of one tenant with secrets, one of another."""
    made: dict[InstanceRef, Seeded] = {}
    for ref, net_id, offset in ((ONE, 7, 5), (TWO, 7, 6), (OTHER, 9, 5)):
        made[ref] = host.seed(ref, net_id=net_id, offset=offset, mem_mib=32, secrets=TOKEN)
        assert (await host.run(SetupNetwork(ref.tenant_id, made[ref].net)))["code"] == "ok"
        assert (await host.run(StartInstance(*names(ref))))["code"] == "ok"
    yield made
    for ref in made:
        await host.run(DestroyInstance(*names(ref), wipe_volumes=True))


# -- the VMM ---------------------------------------------------------------------------------------


async def test_a_vmm_has_no_capabilities_and_its_own_uid_root_and_pids(
    host: LiveHost, seeds: dict[InstanceRef, Seeded]
) -> None:
    uids: set[str] = set()
    for ref in seeds:
        described = await host.describe(ref)
        pid = described["pid"]
        told = Path(f"/proc/{pid}/status").read_text().splitlines()
        facts = {line.partition(":")[0]: line.partition(":")[2].split() for line in told}

        assert len(set(facts["Uid"] + facts["Gid"])) == 1
        assert int(facts["Uid"][0]) >= host.settings.vmm.uid_base
        assert facts["Groups"] == []
        assert {int(facts[name][0], 16) for name in ("CapEff", "CapPrm", "CapAmb")} == {0}
        assert facts["NoNewPrivs"] == ["1"]
        assert facts["Seccomp"] == ["2"]
        assert facts["NSpid"][-1] == "1"
        root = JailLayout(host.settings.jail_base).root(described["jail_id"])
        assert os.path.samestat(os.stat(f"/proc/{pid}/root"), os.stat(root))
        cgroup = Path(f"/proc/{pid}/cgroup").read_text()
        assert f"{host.settings.limits.cgroup}/{ref.tenant_id}/{described['jail_id']}" in cgroup
        uids.add(facts["Uid"][0])
    assert len(uids) == len(seeds)


async def test_a_tap_belongs_to_its_vmms_uid(
    host: LiveHost, seeds: dict[InstanceRef, Seeded]
) -> None:
    for ref, seeded in seeds.items():
        pid = (await host.describe(ref))["pid"]
        done = subprocess.run(
            ["ip", "-d", "-j", "link", "show", "dev", seeded.tap],
            check=True,
            timeout=10,
            capture_output=True,
        )
        [link] = json.loads(done.stdout)

        assert int(link["linkinfo"]["info_data"]["user"]) == os.stat(f"/proc/{pid}").st_uid
        assert link["master"] == seeded.net.bridge_name
        assert link["ifalias"] == f"hostd:{ref}"


# -- secrets and disks -----------------------------------------------------------------------------


def secret_files(host: LiveHost) -> set[str]:
    """Every file of hostd's, on a disk or not, in which the secret can be read."""
    found: set[str] = set()
    for directory, _, files in os.walk(host.directory):
        for name in files:
            path = Path(directory, name)
            if path.name != "secrets.json" and path.is_file() and TOKEN in path.read_bytes():
                found.add(str(path))
    return found


def on_tmpfs(path: str) -> bool:
    """Whether the mount that the file is on is a tmpfs."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    _, kind = max((point, kind) for point, kind in mounts if path.startswith(f"{point}/"))
    return kind == "tmpfs"


def disk_of(host: LiveHost, ref: InstanceRef) -> os.stat_result:
    tenant = Path(host.settings.paths.data, "tenants", ref.tenant_id)
    return (
        tenant / "pools" / ref.pool_id / "instances" / ref.instance_id / "volumes" / "data.ext4"
    ).stat()


async def test_secrets_are_never_on_a_disk_and_are_gone_with_the_vmm(
    host: LiveHost, seeds: dict[InstanceRef, Seeded]
) -> None:
    roots = {ref: await host.jail_root(ref) for ref in seeds}
    drives = {ref: f"{root}/secrets/secrets.ext4" for ref, root in roots.items()}

    assert secret_files(host) == set(drives.values())
    for ref, path in drives.items():
        found = os.stat(path)
        assert on_tmpfs(path)
        assert stat.S_IMODE(found.st_mode) == 0o400
        assert found.st_uid == os.stat(f"/proc/{(await host.describe(ref))['pid']}").st_uid
    labels = [drive["label"] for drive in (await host.ask_guest("Drives", ONE))["Drives"]]
    assert "mvm-secrets" in labels

    slept = await host.run(SleepInstance(*names(ONE), force=False))
    assert slept["detail"]["drain"] == "acknowledged"
    assert secret_files(host) == {drives[TWO], drives[OTHER]}
    await host.run(WakeInstance(*names(ONE)))
    woken = f"{await host.jail_root(ONE)}/secrets/secrets.ext4"
    assert on_tmpfs(woken)
    assert secret_files(host) == {woken, drives[TWO], drives[OTHER]}

    await host.run(StopInstance(*names(ONE)))
    assert secret_files(host) == {drives[TWO], drives[OTHER]}
    assert roots[ONE] not in Path("/proc/self/mounts").read_text()
    assert TOKEN.decode() not in host.log()
    assert (await host.run(StartInstance(*names(ONE))))["code"] == "ok"


async def test_a_data_disk_is_owned_by_the_vmm_in_use_and_by_root_at_rest(
    host: LiveHost, seeds: dict[InstanceRef, Seeded]
) -> None:
    async def check(*, in_use: bool) -> None:
        found = disk_of(host, TWO)
        owner = os.stat(f"/proc/{(await host.describe(TWO))['pid']}").st_uid if in_use else 0
        assert (found.st_uid, found.st_gid) == (owner, owner)
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_nlink == (2 if in_use else 1)

    await check(in_use=True)
    for command, in_use in (
        (SleepInstance(*names(TWO), force=False), False),
        (WakeInstance(*names(TWO)), True),
        (StopInstance(*names(TWO)), False),
        (StartInstance(*names(TWO)), True),
    ):
        assert (await host.run(command))["code"] == "ok"
        await check(in_use=in_use)
    assert (await host.stat(TWO))["boots"] == 2


async def test_a_snapshot_is_readable_by_root_only(
    host: LiveHost, seeds: dict[InstanceRef, Seeded]
) -> None:
    assert await host.ask_guest({"Set": {"drain": "refuse"}}, OTHER) == "Ok"
    await host.run(SleepInstance(*names(OTHER), force=False))
    top = Path(host.settings.paths.state, "snapshots")

    files = [path for path in top.rglob("*") if path.is_file()]
    assert {"state", "mem", "manifest.json", "config.ext4", "secrets.ext4"} <= {
        path.name for path in files
    }
    for path in files:
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o600), path

    assert (await host.run(WakeInstance(*names(OTHER))))["code"] == "ok"


# -- the network -----------------------------------------------------------------------------------


@contextlib.contextmanager
def sniffing(link: str) -> Generator[Sniffer]:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as raw:
        raw.bind((link, ETH_P_ALL))
        yield Sniffer(raw.fileno())


def mac(seeded: Seeded) -> str:
    return naming.mac_address(seeded.net.tenant_net_id, int(seeded.guest_ip.rpartition(".")[2]))


def send_as(sender_mac: str, sender_ip: str, to: Seeded, text: bytes) -> None:
    """Put a datagram into a guest's TAP as if that sender had sent it: the guest answers it."""
    frame = ethernet(sender_mac, mac(to), IPV4, udp(sender_ip, to.guest_ip, 7, 7, text))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as raw:
        raw.bind((to.tap, ETH_P_ALL))
        raw.send(frame)


async def test_a_guest_reaches_its_own_tenants_guests_and_no_other_tenants(
    host: LiveHost, seeds: dict[InstanceRef, Seeded]
) -> None:
    one, two, other = (seeds[ref] for ref in (ONE, TWO, OTHER))
    gateway_mac = naming.mac_address(one.net.tenant_net_id, 1)
    for seeded in seeds.values():
        assert traffic.flows(seeded.guest_ip)

    with sniffing(one.tap) as at_one, sniffing(two.tap) as at_two, sniffing(other.tap) as at_other:
        # What guest one answers goes to whom the question seemed to come from.
        send_as(mac(two), two.guest_ip, one, b"to a neighbour")
        send_as(gateway_mac, other.guest_ip, one, b"to another tenant")
        send_as(gateway_mac, "10.240.9.1", one, b"to another gateway")
        send_as(gateway_mac, "127.0.0.1", one, b"to the loopback")

        neighbour = at_two.wait_for(b"to a neighbour")
        assert neighbour is not None
        # It did send the others too; the host's way to the other tenant is open all the while.
        for text in (b"to another tenant", b"to another gateway", b"to the loopback"):
            assert [frame for frame in frames_with(at_one, text) if is_from(frame, one)]
        assert traffic.udp_echo(other.guest_ip, b"an honest one, later") == b"an honest one, later"
        assert at_other.wait_for(b"an honest one, later")
        for text in (b"to another tenant", b"to another gateway", b"to the loopback"):
            assert not at_other.saw(text)
            assert not at_two.saw(text)


def frames_with(sniffer: Sniffer, text: bytes) -> list[bytes]:
    """Both the question and the answer, once they have passed."""
    assert sniffer.wait_for(text)
    while len(found := [frame for frame in sniffer.frames if text in frame]) < 2:
        seen = len(sniffer.frames)
        sniffer.wait_for(b"\0" * 2000, 0.2)
        assert len(sniffer.frames) > seen, f"the guest did not answer {text!r}"
    return found


def is_from(frame: bytes, seeded: Seeded) -> bool:
    return frame[6:12] == bytes.fromhex(mac(seeded).replace(":", ""))
