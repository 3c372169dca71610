"""Where guests get to: `[network] denied` for all tenants, the operator's file for single ones."""

import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from handlers.errors import HostFault, Invalid
from handlers.network_survey import damaged_tenants
from schemas.records import NetworkRecord
from schemas.settings import NetworkSettings
from tests.kernel.net.frames import IPV4, ethernet, udp
from tests.kernel.net.memory_records import MemoryRecords, host_of
from tests.kernel.net.netns import INTERNET, OUTSIDE
from tests.kernel.net.plans import GuestPlan
from tests.kernel.net.test_isolation import A1, B1, Stage, play, tokens

AZURE, ALIBABA, ORACLE = "168.63.129.16", "100.100.100.200", "192.0.0.192"
LAN, LAN_HOST = "192.168.7.0/24", "192.168.7.9"
NOT_SET_UP = "10.244.0.9"
"""In `allowed`, and of no tenant of this host: a tenant of another one."""
CLOUDS = (AZURE, ALIBABA, ORACLE, "169.254.169.254", "169.254.1.1")


def send(stage: Stage, plan: GuestPlan, address: str) -> bytes:
    token = next(tokens)
    guest = stage.a1 if plan is A1 else stage.b1
    guest.send(ethernet(plan.mac, plan.gateway_mac, IPV4, udp(plan.ip, address, 5000, 4222, token)))
    return token


def reached(stage: Stage, addresses: Sequence[str], plan: GuestPlan = A1) -> set[str]:
    """To which of these a guest's packets come out of the uplink."""
    sent = {address: send(stage, plan, address) for address in addresses}
    last = send(stage, plan, INTERNET)
    assert stage.outside.wait_for(last), "the honest frame did not come out"
    return {address for address, token in sent.items() if stage.outside.saw(token)}


@dataclass
class Policed:
    """A stage with a policy file."""

    stage: Stage
    file: Path

    async def write(self, text: str) -> None:
        """Change the file as an editor does, and let a periodic pass see it."""
        draft = self.file.with_suffix(".new")
        draft.write_text(text)
        draft.rename(self.file)
        await self.stage.net.mechanisms.networks.prepare()


@pytest.fixture
async def policed(tmp_path: Path) -> AsyncIterator[Policed]:
    file = tmp_path / "policy.toml"
    file.write_text("")
    async with play(NetworkSettings(denied=(LAN,), policy=str(file))) as stage:
        yield Policed(stage, file)


async def test_by_default_no_metadata_service_and_no_tenant_of_another_host_is_reached() -> None:
    async with play() as stage:
        assert reached(stage, [*CLOUDS, NOT_SET_UP, LAN_HOST, OUTSIDE]) == {LAN_HOST, OUTSIDE}


async def test_what_the_operator_denies_is_not_reached() -> None:
    async with play(NetworkSettings(denied=(LAN, f"{OUTSIDE}/32"))) as stage:
        assert reached(stage, [LAN_HOST, OUTSIDE, NOT_SET_UP, "192.168.8.9"]) == {"192.168.8.9"}


async def test_denied_networks_that_overlap_are_denied() -> None:
    denied = ("192.168.0.0/16", LAN, "192.168.0.0/17", "10.0.0.0/8", f"{LAN_HOST}/32")
    async with play(NetworkSettings(denied=denied)) as stage:
        assert reached(stage, [LAN_HOST, "192.168.200.1", NOT_SET_UP, OUTSIDE]) == {OUTSIDE}


async def test_a_tenant_reaches_what_its_policy_allows_and_no_other_tenant_does(
    policed: Policed,
) -> None:
    await policed.write(f"[acme]\nallowed = ['{LAN_HOST}']\n")

    assert reached(policed.stage, [LAN_HOST, "192.168.7.8"]) == {LAN_HOST}
    assert reached(policed.stage, [LAN_HOST], B1) == set()


async def test_a_tenant_reaches_only_what_is_allowed_if_all_else_is_denied(
    policed: Policed,
) -> None:
    await policed.write(f"[acme]\nallowed = ['{INTERNET}', '{LAN}']\ndenied = ['0.0.0.0/0']\n")

    assert reached(policed.stage, [LAN_HOST, OUTSIDE]) == {LAN_HOST}
    assert reached(policed.stage, [LAN_HOST, OUTSIDE], B1) == {OUTSIDE}


async def test_a_policy_changed_while_guests_run_ends_their_flows(policed: Policed) -> None:
    await policed.write(f"[acme]\nallowed = ['{LAN}']\n")
    assert reached(policed.stage, [LAN_HOST]) == {LAN_HOST}

    await policed.write("")

    assert reached(policed.stage, [LAN_HOST]) == set()


async def test_a_changed_policy_is_no_drift(policed: Policed) -> None:
    policed.file.write_text(f"[acme]\nallowed = ['{LAN}']\n")

    assert not await policed.stage.net.mechanisms.networks.prepare()
    assert reached(policed.stage, [LAN_HOST]) == {LAN_HOST}


async def test_reload_applies_other_settings_and_never_opens_what_both_deny(
    policed: Policed, tmp_path: Path
) -> None:
    networks = policed.stage.net.mechanisms.networks
    other = tmp_path / "other.toml"
    other.write_text(f"[acme]\ndenied = ['{LAN}']\n")

    await networks.reload(NetworkSettings(denied=(f"{OUTSIDE}/32",), policy=str(other)))

    assert reached(policed.stage, [LAN_HOST, OUTSIDE]) == set()
    assert reached(policed.stage, [LAN_HOST, OUTSIDE], B1) == {LAN_HOST}


async def test_a_policy_that_became_invalid_leaves_the_last_one_in_effect(
    policed: Policed,
) -> None:
    await policed.write(f"[acme]\ndenied = ['{OUTSIDE}']\n")

    await policed.write("[acme]\ndenied = ['everything']\n")

    assert reached(policed.stage, [OUTSIDE, "198.51.100.9"]) <= {"198.51.100.9"}


async def test_settings_with_an_invalid_policy_are_refused_and_change_nothing(
    policed: Policed,
) -> None:
    path = policed.file.with_name("invalid.toml")
    path.write_text("[acme]\ndenied = ['everything']\n")

    with pytest.raises(Invalid, match=r"acme\.denied\[0\].*want an IPv4 network"):
        await policed.stage.net.mechanisms.networks.reload(NetworkSettings(policy=str(path)))

    assert reached(policed.stage, [LAN_HOST, OUTSIDE]) == {OUTSIDE}


@pytest.mark.parametrize(("owner", "mode"), [(0, 0o666), (0, 0o620), (12345, 0o644)])
async def test_a_policy_that_others_may_write_is_refused(
    policed: Policed, owner: int, mode: int
) -> None:
    path = policed.file.with_name("open.toml")
    path.write_text("")
    os.chown(path, owner, 0)
    path.chmod(mode)

    with pytest.raises(HostFault, match="can be written by others"):
        await policed.stage.net.mechanisms.networks.reload(NetworkSettings(policy=str(path)))


async def test_a_removed_tenant_takes_its_policy_along(policed: Policed) -> None:
    await policed.write(f"[umbra]\nallowed = ['{LAN}']\n")
    net = policed.stage.net
    assert net.host.ruleset().count('"br-tenant-300" . 192.168.7.0/24') == 2

    await net.mechanisms.bridges.remove(B1.net.bridge_name)
    await net.mechanisms.tenant_rules.remove(
        f"{B1.net.tenant_net_id},{B1.net.ipv4_subnet},{B1.net.gateway_ip}"
    )

    assert "br-tenant-300" not in net.host.ruleset()


async def test_a_new_worker_puts_the_policy_in_effect_with_the_tenant(policed: Policed) -> None:
    await policed.write(f"[acme]\ndenied = ['{OUTSIDE}']\n")
    net = policed.stage.net
    before = net.host.ruleset()
    net.reopen(NetworkSettings(denied=(LAN,), policy=str(policed.file)))

    await net.mechanisms.networks.prepare()

    assert net.host.ruleset() == before


async def test_a_new_worker_that_repairs_nothing_still_follows_the_policy(policed: Policed) -> None:
    await policed.write("[acme]\nallowed = ['192.168.7.0/24']\n")
    net = policed.stage.net
    net.reopen(NetworkSettings(denied=(LAN,), policy=str(policed.file)))
    journal = MemoryRecords({A1.tenant_id: A1.net, B1.tenant_id: B1.net})
    for plan in (A1, B1):
        journal.networks_up[plan.tenant_id] = NetworkRecord(
            tenant_id=plan.tenant_id, net=plan.net, status="up", since_ms=0
        )
    assert await damaged_tenants(host_of(net, journal), rules_only=False) == (False, [])

    await policed.write(f"[acme]\ndenied = ['{OUTSIDE}']\n")

    assert reached(policed.stage, [LAN_HOST, OUTSIDE]) == set()
    assert reached(policed.stage, [OUTSIDE], B1) == {OUTSIDE}
