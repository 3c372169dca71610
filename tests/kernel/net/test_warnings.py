"""What outside of hostd keeps guests from the network is named; what does not is not."""

from collections.abc import AsyncIterator

import pytest

from schemas.settings import NetworkSettings
from tests.kernel.net.netns import HostNet
from tests.kernel.net.test_isolation import ALLOWED, Stage, play, sent

DROPS = {
    "ip filter FORWARD": (
        "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }"
    ),
    "inet firewall routed": (
        "table inet firewall { chain routed { type filter hook forward priority 10; policy drop;\n"
        ' iifname "docker0" accept\n}; }'
    ),
    "inet early pre": (
        "table inet early { chain pre { type filter hook prerouting priority -200; policy drop;\n"
        " ip protocol tcp accept\n}; }"
    ),
    "bridge l2 routed": (
        "table bridge l2 { chain routed { type filter hook prerouting priority 5; policy drop; }; }"
    ),
}
HARMLESS = {
    "accepting": (
        "table ip filter { chain FORWARD { type filter hook forward priority 0; policy accept; }; }"
    ),
    "IPv6": (
        "table ip6 filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }"
    ),
    "input": (
        "table inet firewall { chain in { type filter hook input priority 0; policy drop;\n"
        ' iifname "br-tenant-*" accept\n}; }'
    ),
    "names the bridges": (
        "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop;\n"
        ' iifname "br-tenant-*" accept\n oifname "br-tenant-*" accept\n}; }'
    ),
}


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with play() as made:
        yield made


@pytest.mark.parametrize(("chain", "ruleset"), DROPS.items(), ids=DROPS)
async def test_a_chain_that_drops_guests_packets_is_named(
    stage: Stage, chain: str, ruleset: str
) -> None:
    stage.net.host.nft(ruleset)

    (warning,) = await stage.net.mechanisms.networks.warnings(1)

    assert f"chain {chain} of another program" in warning


@pytest.mark.parametrize("ruleset", HARMLESS.values(), ids=HARMLESS)
async def test_what_lets_guests_through_is_no_warning(stage: Stage, ruleset: str) -> None:
    stage.net.host.nft(ruleset)

    assert await stage.net.mechanisms.networks.warnings(1) == ()
    assert sent(stage, ALLOWED) == dict.fromkeys(ALLOWED, True)


async def test_a_conntrack_table_too_small_for_all_tenants_is_named() -> None:
    with HostNet() as net:
        maximum = int(net.host.sysctl("netfilter/nf_conntrack_max"))
        networks = net.reopen(NetworkSettings(max_flows=maximum // 2)).networks

        assert await networks.warnings(2) == ()
        (warning,) = await networks.warnings(3)

    assert f"nf_conntrack_max is {maximum}, but 3 tenants may track {maximum // 2}" in warning


async def test_without_tenants_there_is_nothing_to_warn_of() -> None:
    with HostNet() as net:
        net.host.nft(DROPS["ip filter FORWARD"])

        assert await net.mechanisms.networks.warnings(0) == ()
