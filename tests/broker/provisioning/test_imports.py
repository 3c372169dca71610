"""A server configuration that lacks an import: the account and the import are named."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.broker.provisioning.test_permissions import (
    ACCOUNTS,
    GRANTS,
    H1,
    HOSTS,
    PROGRAMS,
    Roles,
    example_accounts,
    password,
)
from tests.broker.server import Receiver, Server, eventually
from worker.bus import accounts
from worker.bus.protocol import NotProvisioned
from worker.bus.provision import provision
from worker.cli.main import main


def without(text: str, account: str, grant: accounts.Grant) -> str:
    """The configuration without one import of an account."""
    start = text.index(f"  {account} {{\n")
    end = text.index("\n  }\n", start)
    line = f'{{ {grant.kind}: {{ account: {grant.owner}, subject: "{grant.subject}" }}'
    kept = [one for one in text[start:end].splitlines() if not one.strip().startswith(line)]
    return text[:start] + "\n".join(kept) + text[end:]


def checkable(account: str) -> list[accounts.Grant]:
    """Imports of the account that can be asked for."""
    return [
        grant
        for grant in GRANTS
        if account in grant.to
        and (grant.kind, grant.owner) == ("service", accounts.OWNER)
        and not re.search(r"MSG\.NEXT|JS\.ACK\.\*", grant.subject)
    ]


@asynccontextmanager
async def cell(
    directory: Path, account: str, grant: accounts.Grant, *, program: str = ""
) -> AsyncGenerator[Roles]:
    """A provisioned cell whose server then lost one import of an account."""
    async with AsyncExitStack() as stack:
        server = Server(str(directory / "nats"), config=example_accounts(), program=program)
        await server.start()
        stack.push_async_callback(server.stop)
        roles = Roles(server, stack)
        await provision(await roles.role("admin"), H1, HOSTS)
        await server.stop()
        server.configure(without(example_accounts(), account, grant))
        await server.start()
        yield roles


async def run(roles: Roles, directory: Path, *accounts_: str) -> Result:
    """`hostd provision` as the administrator, with `--check-creds` of some accounts."""
    for user in (*ACCOUNTS, "single"):
        path = directory / f"{user}.creds"
        path.write_text(f"{user}:{password(user)}")
        path.chmod(0o600)
    users = {account: user for user, account in ACCOUNTS.items()}
    arguments = ["provision", "--json", "--url", roles.server.url]
    arguments += ["--creds", str(directory / "admin.creds")]
    arguments += ["--host", "h1", "--host", "h2"]
    for account in accounts_:
        arguments += ["--check-creds", f"{account}={directory / users[account]}.creds"]
    return await asyncio.to_thread(CliRunner().invoke, main, arguments)


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_complete_configuration_lacks_nothing(tmp_path: Path, program: str) -> None:
    async with AsyncExitStack() as stack:
        server = Server(str(tmp_path / "nats"), config=example_accounts(), program=program)
        await server.start()
        stack.push_async_callback(server.stop)
        names = ("ADMIN", "DASHBOARD", "HOST_h1", "AGENTD_h1", "HOST_h2", "AGENTD_h2")

        done = await run(Roles(server, stack), tmp_path, *names)

        assert done.exit_code == 0, done.output
        made = json.loads(done.stdout)
        assert [(one["what"], one["how"]) for one in made[-6:]] == [
            (f"account {name}", "found") for name in names
        ]


@pytest.mark.parametrize("grant", checkable("HOST_h1"), ids=lambda grant: grant.subject)
async def test_the_worker_names_the_import_that_its_account_lacks(
    tmp_path: Path, grant: accounts.Grant
) -> None:
    async with cell(tmp_path, "HOST_h1", grant) as roles:
        bus = await roles.host()

        with pytest.raises(NotProvisioned) as raised:
            await bus.verify()

        assert f"account HOST_h1 lacks {accounts.describe(grant)}" in str(raised.value)


async def test_the_worker_reports_that_its_pulls_reach_nobody(tmp_path: Path) -> None:
    (grant,) = [one for one in GRANTS if one.subject.endswith("MSG.NEXT.HOSTD_CMD_default.h1")]
    async with cell(tmp_path, "HOST_h1", grant) as roles:
        bus, receiver = await roles.host(), Receiver()
        consumer = asyncio.create_task(bus.consume(receiver))
        try:
            assert await eventually(lambda: "nothing answers" in bus.trouble, 20)
            assert "CONSUMER.MSG.NEXT.HOSTD_CMD_default.h1" in bus.trouble

            roles.server.configure(example_accounts())
            await roles.server.restart()
            agentd = await roles.role("agentd-h1")
            await agentd.request(f"{H1.root}.h1.cmd.host", b"x")
            assert await receiver.wait_for(b"x", 20)
            assert await eventually(lambda: bus.trouble == "", 20)
        finally:
            consumer.cancel()
            await asyncio.gather(consumer, return_exceptions=True)


@pytest.mark.parametrize(
    ("account", "part"),
    [
        ("AGENTD_h1", "h1.cmd.>"),
        ("AGENTD_h1", "DIRECT.GET.HOSTD_REPLY"),
        ("DASHBOARD", "STREAM.INFO.HOSTD_EVT"),
        ("HOST_h2", "h2.dead.>"),
    ],
)
async def test_provision_names_the_account_and_what_it_lacks(
    tmp_path: Path, account: str, part: str
) -> None:
    grant = next(one for one in checkable(account) if part in one.subject)
    async with cell(tmp_path, account, grant) as roles:
        done = await run(roles, tmp_path, "HOST_h1", account)

        assert done.exit_code == 12, done.output
        made = json.loads(done.stdout.splitlines()[0])
        assert made[-1]["how"] == "lacking"
        assert made[-1]["detail"] == f"account {account} lacks {accounts.describe(grant)}"


async def test_provision_says_what_the_administrator_lacks(tmp_path: Path) -> None:
    grant = GRANTS[0]
    assert grant.to == ("ADMIN",)
    async with cell(tmp_path, "ADMIN", grant) as roles:
        done = await run(roles, tmp_path)

        assert done.exit_code in (12, 30), done.output
        assert re.search(r"JetStream", done.output)


async def test_one_account_for_all_roles_is_reported(tmp_path: Path) -> None:
    users = [f'{{ user: "{user}", password: "{password(user)}" }}' for user in ACCOUNTS]
    config = f"accounts {{ A {{ jetstream: enabled, users: [ {', '.join(users)} ] }} }}"
    async with AsyncExitStack() as stack:
        server = Server(str(tmp_path / "nats"), config=config)
        await server.start()
        stack.push_async_callback(server.stop)

        done = await run(Roles(server, stack), tmp_path, "DASHBOARD")

        assert done.exit_code == 12, done.output
        assert "account DASHBOARD has JetStream of its own or all of another" in done.output


@pytest.mark.parametrize("value", ["HOST_h9=/x", "HOST_h1", "SYS=/x", "HOST_h1="])
def test_an_unknown_account_is_a_usage_error(value: str) -> None:
    arguments = ["provision", "--host", "h1", "--check-creds", value]
    done = CliRunner().invoke(main, arguments)

    assert (done.exit_code, "invalid --check-creds" in done.output) == (2, True)
