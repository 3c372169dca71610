"""`hostd dead` with the accounts of deploy/nats/hostd.conf: who reads, drops, sends again."""

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.broker.provisioning.test_permissions import API, DOMAIN, H1, H2, Roles, password
from tests.broker.provisioning.test_permissions import roles as roles_fixture
from tests.broker.server import Receiver
from worker.bus.message import NoResponder
from worker.cli.main import main

roles = roles_fixture
LETTER = b"\xc1"


def credentials(directory: Path, user: str) -> str:
    """The user's credentials file."""
    path = directory / user
    path.write_text(f"{user}:{password(user)}\n")
    path.chmod(0o600)
    return str(path)


async def hostd(roles: Roles, *args: str) -> Result:
    setting = {
        "HOSTD_CONFIG": None,
        "HOSTD_HOST_ID": H1.host_id,
        "HOSTD_NATS_URL": roles.server.url,
        "HOSTD_NATS_JS_DOMAIN": DOMAIN,
    }
    return await asyncio.to_thread(CliRunner().invoke, main, args, env=setting)


async def test_the_administrator_reads_and_drops_and_the_agentd_sends_again(
    roles: Roles, tmp_path: Path
) -> None:
    host = await roles.host()
    received = Receiver()
    consuming = asyncio.create_task(host.consume(received))
    dead = f"{H1.root}.{H1.host_id}.dead.network.acme"
    await host.publish(dead, LETTER, msg_id="c-1", headers={"Hostd-Reason": "no map"})
    admin, agentd = (credentials(tmp_path, user) for user in ("admin", "agentd-h1"))

    listed = await hostd(roles, "dead", "ls", "--json", "--creds", admin)
    (letter,) = json.loads(listed.stdout)["dead_letters"]
    seq = str(letter["seq"])
    sent = await hostd(roles, "dead", "replay", seq, "--creds", admin, "--send-creds", agentd)
    arrived = await received.wait_for(LETTER, 10)
    dropped = await hostd(roles, "dead", "drop", seq, "--creds", admin)
    empty = await hostd(roles, "dead", "ls", "--creds", admin)
    consuming.cancel()
    await asyncio.gather(consuming, return_exceptions=True)

    assert (letter["reason"], letter["id"], letter["lane"]) == ("no map", "c-1", "network.acme")
    assert sent.exit_code == 0, sent.output
    assert arrived
    assert (dropped.exit_code, dropped.stdout) == (0, f"ok: dropped {seq}\n")
    assert empty.stdout == "no dead letters\n"


async def test_a_dashboard_reads_them_and_drops_none(roles: Roles, tmp_path: Path) -> None:
    """As the fleet page does; the commands `hostd dead` are the administrator's."""
    host, dashboard = await roles.host(), await roles.role("dashboard")
    await host.publish(f"{H1.root}.{H1.host_id}.dead.host", LETTER, msg_id="c-1")
    stream, credential = H1.dead_stream, credentials(tmp_path, "dashboard")

    kept = await dashboard.request(f"{API}DIRECT.GET.{stream}", b'{"seq":1}')
    with pytest.raises(NoResponder):
        await dashboard.request(f"{API}STREAM.MSG.DELETE.{stream}", b'{"seq":1}', timeout_s=2)
    refused = await hostd(roles, "dead", "drop", "1", "--creds", credential)
    still = await dashboard.request(f"{API}DIRECT.GET.{stream}", b'{"seq":1}')

    assert (kept.data, still.data, refused.exit_code) == (LETTER, LETTER, 30)


@pytest.mark.parametrize("user", ["host-h1", "agentd-h1"])
async def test_no_other_role_reads_or_drops_them(roles: Roles, tmp_path: Path, user: str) -> None:
    host = await roles.host()
    dead = f"{H1.root}.{H1.host_id}.dead.host"
    await host.publish(dead, LETTER, msg_id="c-1")
    others, admin = credentials(tmp_path, user), credentials(tmp_path, "admin")

    refused = [
        await hostd(roles, "dead", *each, "--creds", others)
        for each in (("ls",), ("show", "1"), ("drop", "1"))
    ]
    kept = await hostd(roles, "dead", "ls", "--json", "--creds", admin)

    assert [result.exit_code for result in refused] == [30, 30, 30]
    assert len(json.loads(kept.stdout)["dead_letters"]) == 1


async def test_a_host_counts_its_own_without_reading_any(roles: Roles) -> None:
    host, other = await roles.host(), await roles.host(H2)
    none = await host.dead_letters()
    for n, lane in enumerate(("network.acme", "network.acme", "host")):
        await host.publish(f"{H1.root}.h1.dead.{lane}", LETTER, msg_id=f"c-{n}")
    await other.publish(f"{H1.root}.h2.dead.host", LETTER, msg_id="c-9")

    assert (none, await host.dead_letters(), await other.dead_letters()) == (0, 3, 1)
