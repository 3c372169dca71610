"""Networks that a host must not set up: refused, and nothing on the host has changed."""

import json
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from schemas.requests import SetupNetwork, TeardownNetwork, TenantNet
from tests.live_host import LiveHost
from worker.cli.seed import net_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACME = net_of(7)
ROUTED = "10.240.20.0/24"
UMBRA = "umbra"


def net(**changes: object) -> TenantNet:
    return msgspec.structs.replace(net_of(9), **changes)


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=True, timeout=10, capture_output=True, text=True)
    return done.stdout


def links() -> list[str]:
    return ip("-br", "link").splitlines() + ip("-br", "addr").splitlines()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def acme(host: LiveHost) -> AsyncIterator[LiveHost]:
    """acme's network is up, and the host has a route and a link that are not hostd's."""
    ip("link", "add", "theirs", "type", "bridge")
    ip("link", "set", "theirs", "up")
    ip("route", "add", ROUTED, "dev", "theirs")
    ip("tuntap", "add", "br-tenant-31", "mode", "tap")
    ip("link", "add", "br-tenant-32", "type", "bridge")
    ip("address", "add", "172.16.32.1/24", "dev", "br-tenant-32")
    assert (await host.net_up(host.seed()))["code"] == "ok"
    yield host


def tell_tenant(host: LiveHost, tenant_net: TenantNet) -> None:
    """Have umbra's `tenant.json` say the net."""
    directory = Path(host.settings.paths.data, "tenants", UMBRA)
    directory.mkdir(exist_ok=True)
    quotas = json.loads((directory.parent / "acme" / "tenant.json").read_bytes())["quotas"]
    content = {"tenant_id": UMBRA, "quotas": quotas, "net": msgspec.to_builtins(tenant_net)}
    (directory / "tenant.json").write_text(json.dumps(content))


FIELD = "$.request.SetupNetwork.net"
BAD: dict[str, tuple[TenantNet, str, str | None]] = {
    "gateway outside": (net(gateway_ip="10.240.10.1"), "invalid", f"{FIELD}.gateway_ip"),
    "gateway the subnet's own": (net(gateway_ip="10.240.9.0"), "invalid", f"{FIELD}.gateway_ip"),
    "gateway no address": (net(gateway_ip="10.240.9.01"), "invalid", f"{FIELD}.gateway_ip"),
    "another bridge": (net(bridge_name="br-tenant-7"), "invalid", f"{FIELD}.bridge_name"),
    "an injected bridge": (net(bridge_name="eth0; reboot"), "invalid", f"{FIELD}.bridge_name"),
    "host bits": (net(ipv4_subnet="10.240.9.1/24"), "invalid", f"{FIELD}.ipv4_subnet"),
    "not canonical": (
        net(ipv4_subnet="10.240.9.0/255.255.255.0"),
        "invalid",
        f"{FIELD}.ipv4_subnet",
    ),
    "outside the allowed": (
        net(ipv4_subnet="192.168.9.0/24", gateway_ip="192.168.9.1"),
        "invalid",
        f"{FIELD}.ipv4_subnet",
    ),
    "everything": (
        net(ipv4_subnet="0.0.0.0/0", gateway_ip="10.0.0.1"),
        "invalid",
        f"{FIELD}.ipv4_subnet",
    ),
    "an id too high": (
        net(tenant_net_id=4096, bridge_name="br-tenant-4096"),
        "invalid",
        f"{FIELD}.tenant_net_id",
    ),
    "another tenant's id": (
        net(tenant_net_id=7, bridge_name="br-tenant-7"),
        "conflict",
        None,
    ),
    "another tenant's subnet": (
        net(ipv4_subnet=ACME.ipv4_subnet, gateway_ip=ACME.gateway_ip),
        "conflict",
        None,
    ),
    "part of another tenant's subnet": (
        net(ipv4_subnet="10.240.7.128/25", gateway_ip="10.240.7.129"),
        "conflict",
        None,
    ),
    "around another tenant's subnet": (
        net(ipv4_subnet="10.240.0.0/20", gateway_ip="10.240.0.1"),
        "conflict",
        None,
    ),
    "a route of the host": (
        net(ipv4_subnet=ROUTED, gateway_ip="10.240.20.1"),
        "conflict",
        None,
    ),
    "part of a route of the host": (
        net(ipv4_subnet="10.240.20.64/26", gateway_ip="10.240.20.65"),
        "conflict",
        None,
    ),
    "a foreign link with the bridge's name": (net_of(31), "conflict", None),
    "a foreign bridge with the bridge's name": (net_of(32), "conflict", None),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_network_is_refused_and_nothing_changes(acme: LiveHost, case: str) -> None:
    bad, code, path = BAD[case]
    await refused(acme, bad, code, path, lambda: tell_tenant(acme, bad))


async def test_a_network_other_than_the_files_is_a_conflict(acme: LiveHost) -> None:
    await refused(acme, net_of(9), "conflict", FIELD, lambda: tell_tenant(acme, net_of(10)))


async def test_a_tenant_without_a_file_has_no_network(acme: LiveHost) -> None:
    def forget() -> None:
        tell_tenant(acme, net_of(9))
        Path(acme.settings.paths.data, "tenants", UMBRA, "tenant.json").unlink()

    await refused(acme, net_of(9), "not_found", "tenant.json", forget)


async def refused(
    host: LiveHost, bad: TenantNet, code: str, path: str | None, arrange: Callable[[], None]
) -> None:
    arrange()
    before, there = await host.inventory(), links()

    reply = await host.run(SetupNetwork(UMBRA, bad))

    assert reply["code"] == code, reply
    if path is not None:
        assert reply["detail"]["path"].endswith(path), reply
    assert reply["detail"]["act"] == "sender"
    assert not reply["changed"]
    assert not reply.get("left_behind")
    assert await host.inventory() == before
    assert links() == there
    async with host.client() as client:
        listed = await client.ask(host.settings.host.id, "list")
    assert [network["tenant_id"] for network in listed["networks"]] == ["acme"]


@pytest.mark.parametrize(
    ("tenant", "tenant_net"), [("acme", net_of(8)), (UMBRA, ACME)], ids=["another net", "another's"]
)
async def test_a_teardown_takes_down_no_other_network(
    acme: LiveHost, tenant: str, tenant_net: TenantNet
) -> None:
    before, there = await acme.inventory(), links()

    reply = await acme.run(TeardownNetwork(tenant, tenant_net))

    assert reply["code"] == "conflict", reply
    assert await acme.inventory() == before
    assert links() == there
