"""The `nats` command with the example's accounts and a real worker, typed as the pages say.

`make setup` compiles it where Go is (ADR 1073); without Go these tests say that it was not there.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import pytest
import pytest_asyncio

from schemas.protocol.queries import REQUESTS
from schemas.requests import Request, SetupNetwork, StopInstance, TeardownNetwork
from schemas.serde import REQUEST
from schemas.settings import NatsSettings
from schemas.subjects import Subjects
from tests.broker.server import ExampleServer, connection_to
from tests.console import Step, steps
from tests.constants import NAMES, REF, START
from tests.guests.cache import BUILD, REPOSITORY
from tests.guests.namespace import own_network
from tests.live_host import LiveHost
from tests.protocol.validators import accepts
from tests.shell import Shell, shell
from tests.vm.documents.sandbox import PATHS
from worker.bus.provision import provision
from worker.cli.client import connect

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPERATIONS, AGENTD = (REPOSITORY / "docs" / name for name in ("operations.md", "agentd.md"))
EXAMPLE = REPOSITORY / "deploy" / "nats" / "hostd.conf"
TOOL = BUILD / "tools" / "nats"
HOSTS, PORT, DOMAIN, CELL = ("h1", "h2"), 4222, "hostd", "default"  # the example's
SUBJECTS = Subjects(f"hostd.v1.{CELL}", HOSTS[0], CELL)


class HostdConf(ExampleServer):
    example = EXAMPLE


@dataclass
class Typed:
    """A shell that has `nats` and `hostd`, and its contexts; h1 has a worker."""

    shell: Shell
    host: LiveHost

    async def send(self, request: Request, command_id: str | None = None) -> str:
        """As agentd; the code of the reply."""
        url = f"nats://agentd-h1:h1@127.0.0.1:{PORT}"
        nats = NatsSettings(url=url, js_domain=DOMAIN)
        async with connect(msgspec.structs.replace(self.host.settings, nats=nats)) as client:
            reply = await client.send("h1", request, timeout_s=30, command_id=command_id)
            return str(reply["code"])

    async def type(self, text: str) -> str:
        """What it prints; it has to succeed."""
        code, output = await self.shell.type(f"( set -e; set -o pipefail\n{text}\n)")
        assert code == 0, output
        return output

    async def copy(self, step: Step) -> None:
        output = await self.type(step.block.text)
        assert step.matches(output), repr(output)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def at(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Typed]:
    if not TOOL.exists():
        if shutil.which("go") is None:
            pytest.skip("Go is missing, so the nats command was not compiled: install Go 1.26")
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {TOOL}: run `make setup`")
    directory = tmp_path_factory.mktemp("nats-command")
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(own_network())
        server = HostdConf(str(directory / "nats"), port=PORT)
        await server.start()
        stack.push_async_callback(server.stop)
        async with connection_to(f"nats://admin:admin@127.0.0.1:{PORT}") as admin:
            await provision(admin, SUBJECTS, HOSTS)
        bus = NatsSettings(url=f"nats://host-h1:h1@127.0.0.1:{PORT}", js_domain=DOMAIN)
        host = LiveHost(host_id=HOSTS[0], cell=CELL, bus=bus)
        stack.push_async_callback(host.close)
        await host.start_worker()
        path = f"{TOOL.parent}:{REPOSITORY}/.venv/bin:{PATHS}"
        environment = {"PATH": path, "XDG_CONFIG_HOME": str(directory), "LANG": "C.UTF-8"}
        made = Typed(await stack.enter_async_context(shell(environment)), host)
        contexts, *_ = steps(OPERATIONS, "test_the_nats_command_is_used_by_copying")
        await made.copy(contexts)
        yield made


async def test_the_nats_command_is_used_by_copying(at: Typed) -> None:
    _, asking, following = steps(OPERATIONS, "test_the_nats_command_is_used_by_copying")

    await at.copy(asking)

    copying = asyncio.create_task(at.copy(following))
    while not copying.done():  # the shell does not say when it has subscribed
        await at.send(StopInstance(*NAMES))
    await copying


async def test_a_command_is_sent_with_the_nats_command_by_copying(at: Typed) -> None:
    send, ask = steps(AGENTD, "test_a_command_is_sent_with_the_nats_command_by_copying")

    await at.copy(send)
    await at.host.result("shell-1")
    await at.copy(ask)


async def test_each_query_in_json_is_answered_in_json_to_the_nats_command(at: Typed) -> None:
    """As docs/protocol/questions.md says."""
    seeded = at.host.seed()
    assert await at.send(SetupNetwork(REF.tenant_id, seeded.net), "net-1") == "ok"
    bodies = {
        "describe": {"tenant_id": REF.tenant_id},
        "usage": {"tenant_id": REF.tenant_id},
        "result": {"id": "net-1"},
        "explain": {"request": REQUEST.write(START)},
    }
    for verb in REQUESTS:
        command = f"req --raw {SUBJECTS.ask(verb)} '{json.dumps(bodies.get(verb, {}))}'"
        for role in ("agentd-h1", "dashboard"):
            answer = json.loads(await at.type(f"nats --context {role} {command}"))

            assert accepts(f"ask.{verb}.answer", answer), answer
            assert "error" not in answer
    assert await at.send(TeardownNetwork(REF.tenant_id, seeded.net)) == "ok"


async def test_a_role_may_do_with_the_nats_command_what_is_its_own_alone(at: Typed) -> None:
    """The administrator has all, so only what it sees is asked for."""
    denied = {
        "agentd-h1": (
            "stream ls",
            "stream info HOSTD_EVT_default",
            "kv ls HOSTD_STATE_default",
            "req hostd.v1.default.h2.ask.ping {}",
        ),
        "dashboard": (
            "stream ls",
            "stream purge -f HOSTD_EVT_default",
            "consumer report HOSTD_CMD_default",
            "kv put HOSTD_STATE_default h1.host x",
            "req hostd.v1.default.h1.cmd.host x",
        ),
    }

    assert "HOSTD_REPLY_default" in await at.type("nats --context admin stream ls")
    for role, commands in denied.items():
        for command in commands:
            code, output = await at.shell.type(f"nats --timeout 1s --context {role} {command}")
            assert re.search(r"(?i)no respon(ders|se from stream)", output), (command, output)
            assert code == (0 if command.startswith("req") else 1)
