"""`hostd explain` and `ask.explain` on a real host: each command is explained, then sent."""

import json
from collections import Counter
from typing import Any

from schemas.requests import Request, SetupNetwork, TeardownNetwork
from schemas.serde import REQUEST
from tests.constants import DESTROY, NAMES, REF, SLEEP, START, STOP, WAKE
from tests.live_host import LiveHost, live_host
from tests.vm.control.local_cli import hostd


async def asked(host: LiveHost, request: Request) -> dict[str, Any]:
    body = {"request": REQUEST.write(request, compact=False)}
    async with host.client() as client:
        return await client.ask(host.settings.host.id, "explain", body)


def steps(answer: dict[str, Any]) -> Counter[tuple[str, str]]:
    return Counter((step["name"], step["outcome"]) for step in answer["steps"])


async def test_a_whole_life_goes_as_it_was_explained() -> None:
    """Kernel, files and VMMs are asked in earnest: what is there is found, and stays as it was."""
    async with live_host() as host:
        net = host.seed().net
        up, down = SetupNetwork(REF.tenant_id, net), TeardownNetwork(REF.tenant_id, net)
        for request in (up, START, SLEEP, WAKE, STOP, START, DESTROY, down):
            before = await host.inventory()
            answer = await asked(host, request)
            assert await host.inventory() == before

            reply = await host.run(request)

            assert (answer["refused"], reply["code"]) == (None, "ok"), request
            assert steps(answer) == steps(reply), request
            assert (answer["status"], answer["changes"]) == (reply["status"], reply["changed"])


async def test_a_refusal_is_printed_with_its_exit_code_and_is_that_of_the_command() -> None:
    async with live_host() as host:
        host.seed()

        result = await hostd(host, "explain", "start", *NAMES, "--json")
        reply = await host.run(START)

        refused = json.loads(result.stdout)["refused"]
        assert (refused["code"], result.exit_code) == (reply["code"], 12)
        assert refused["message"] == reply["response"]["Error"]["message"]
