"""`hostd decode` refuses exactly what a worker refuses, with the same code and path."""

import json
import random
from pathlib import Path
from typing import Any

import msgpack
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Form, Reply
from schemas.requests import Request, SetupNetwork, TeardownNetwork
from schemas.subjects import Lane
from tests.constants import NET
from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from tests.fakes.shell_worker import SUBJECTS, ShellWorker, command, shell_worker, start
from tests.plain import unpacked
from worker.cli.codec import decode

Verdict = tuple[str, str] | None  # code and path of a refusal

GOOD: dict[str, Any] = unpacked(codec.encode_command(command(start(), reply_to="_INBOX.1")))
SUBJECT = SUBJECTS.command(Lane.of_request(start()))
HOSTILE: dict[str, dict[str, Any]] = {
    "good": {},
    "version": {"v": 2},
    "id": {"id": "a b"},
    "deadline": {"deadline_ms": -1},
    "variant": {"request": {"Grow": {}}},
    "field": {"request": {"StopInstance": {"x": 1}}},
    "compact": {"request": {"StopInstance": ["acme", "web", "a1"]}},
    "surplus": {"request": {"StopInstance": ["acme", "web", "a1", None, None]}},
    "unknown key": {"x": 1},
    "another inbox": {"reply_to": "hostd.v1.test.h2.cmd.host"},
    "wildcard": {"reply_to": "_INBOX.*"},
    "empty token": {"reply_to": "_INBOX..1"},
    "blank": {"reply_to": "_INBOX.a b"},
    "empty inbox": {"reply_to": ""},
    "long inbox": {"reply_to": "_INBOX." + "a" * 300},
    "inbox and request": {"reply_to": "x", "request": {"Grow": {}}},
    "another instance": {"request": {"StopInstance": ["acme", "web", "a2"]}},
    "ping in another lane": {"request": "Ping"},
    "event": {"request": None, "kind": "status"},
}


def of_decode(data: bytes, subject: str | None, **env: str) -> Verdict:
    found = CliRunner().invoke(
        decode,
        [] if subject is None else ["--subject", subject],
        input=data,
        env={"HOSTD_HOST_ID": "h1", "HOSTD_CONFIG": None, **env},
        catch_exceptions=False,
    )
    error = json.loads(found.stdout).get("error")
    assert (error is None) == (found.exit_code == 0)
    return error and (error["code"], error["path"])


def of_reply(reply: Reply) -> Verdict:
    return None if reply.code is Code.OK else (reply.code.value, reply.detail["path"])


async def of_intake(worker: ShellWorker, data: bytes, subject: str) -> Verdict:
    before = len(worker.bus.replies())
    worker.bus.command(subject, data)
    await worker.bus.until(replies=before + 1)
    await worker.bus.until_acked()
    return of_reply(codec.decode_reply(worker.bus.replies()[-1].payload))


@pytest.mark.parametrize("subject", [SUBJECT, SUBJECT.replace("a1", "A1"), SUBJECT + ".x"])
async def test_both_say_the_same_of_a_hostile_message(tmp_path: Path, subject: str) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        for number, (name, changes) in enumerate(HOSTILE.items()):
            data = msgpack.packb({**GOOD, "id": f"c{number}", **changes})

            verdict = await of_intake(worker, data, subject)

            assert of_decode(data, subject) == verdict, name
            assert (verdict is None) == (
                subject == SUBJECT and name in {"good", "compact", "unknown key"}
            ), name


async def test_both_say_the_same_of_damaged_bytes(tmp_path: Path) -> None:
    chance = random.Random(7)
    refused = 0
    async with shell_worker(tmp_path / "j") as worker:
        for number in range(300):
            data = bytearray(msgpack.packb({**GOOD, "id": f"c-{number:04}"}))
            at = chance.randrange(len(data))
            match number % 3:
                case 0:
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    del data[at:]
                case _:
                    data[at:at] = chance.randbytes(chance.randrange(1, 4))

            verdict = await of_intake(worker, bytes(data), SUBJECT)

            assert of_decode(bytes(data), SUBJECT) == verdict, data.hex()
            refused += verdict is not None
    assert 200 < refused < 300


NETS: list[dict[str, Any]] = [
    {},
    {"ipv4_subnet": "10.240.3.1/24"},
    {"ipv4_subnet": "10.240.3.0/30"},
    {"ipv4_subnet": "192.168.3.0/24"},
    {"gateway_ip": "10.240.3.0"},
    {"gateway_ip": "10.240.4.1"},
    {"gateway_ip": "x"},
    {"bridge_name": "eth0"},
    {"tenant_net_id": 4, "bridge_name": "br-tenant-4"},
]


@pytest.mark.parametrize("kind", [SetupNetwork, TeardownNetwork])
@pytest.mark.parametrize("changes", NETS, ids=str)
async def test_both_say_the_same_of_a_net(
    tmp_path: Path, kind: type[SetupNetwork] | type[TeardownNetwork], changes: dict[str, Any]
) -> None:
    """What a worker answers `conflict` depends on its host, which decode does not look at."""
    request: Request = kind("acme", replace(NET, **changes))
    async with memory_worker(tmp_path / "j", seeded()) as worker:
        reply = await worker.run(request, "c1")

    verdict = of_decode(codec.encode_command(command(request, form=Form.COMPACT)), None)

    assert verdict == (of_reply(reply) if reply.code is Code.INVALID else None)
    assert reply.code in {Code.OK, Code.INVALID, Code.CONFLICT}


def test_the_rules_are_those_of_the_settings() -> None:
    inbox = msgpack.packb({**GOOD, "reply_to": "agentd.inbox.1"})
    net = codec.encode_command(command(SetupNetwork("acme", NET)))

    assert of_decode(inbox, None) == ("invalid", "$.reply_to")
    assert of_decode(inbox, None, HOSTD_NATS_INBOX_PREFIXES='["agentd.inbox."]') is None
    assert of_decode(net, None) is None
    assert of_decode(net, None, HOSTD_NETWORK_ALLOWED='["10.0.0.0/16"]') == (
        "invalid",
        "$.request.SetupNetwork.net.ipv4_subnet",
    )
