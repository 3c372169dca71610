"""What no worker can understand is answered, put aside, and changes nothing: over a real bus."""

import asyncio
import hashlib
import struct

import msgpack
import nats.js.errors
import pytest

from schemas.subjects import Lane, Subjects
from schemas.unpack import MESSAGE_MAX_BYTES
from tests.constants import NAMES, REF, START
from tests.live_host import LiveHost

pytestmark = pytest.mark.asyncio(loop_scope="module")

IDS = dict(zip(("tenant_id", "pool_id", "instance_id"), NAMES, strict=True))
NET = {
    "tenant_net_id": 7,
    "ipv4_subnet": "10.240.7.0/24",
    "gateway_ip": "10.240.7.1",
    "bridge_name": "br-tenant-7",
}


ID = "0123456789abcdef"
"""Stands in each case for the command's id, which is another one each time."""


def envelope(request: object, **more: object) -> bytes:
    data: bytes = msgpack.packb({"v": 1, "id": ID, "request": request} | more)
    return data


def start(**changes: object) -> dict[str, dict[str, object]]:
    return {"StartInstance": IDS | changes}


def empty_maps(size_bytes: int) -> bytes:
    count = size_bytes - 5
    return b"\xdd" + struct.pack(">I", count) + b"\x80" * count


# What arrives, the code of its answer, and the field that the answer names.
BAD: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "invalid", "$"),
    "text": (b"hello, hostd", "invalid", "$"),
    "json": (b'{"v": 1, "id": "x", "request": "Ping"}', "invalid", "$"),
    "cut off": (envelope(start())[:-3], "invalid", "$"),
    "trailing bytes": (envelope(start()) + b"\xc0", "invalid", "$"),
    "no map": (msgpack.packb([1, "id", "Ping"]), "invalid", "$"),
    "empty maps": (empty_maps(MESSAGE_MAX_BYTES - 512), "invalid", "$"),
    "nested": (b"\x91" * 60_000 + b"\xc0", "invalid", "$"),
    "another version": (envelope(start(), v=2), "invalid", "$.v"),
    "no request": (msgpack.packb({"v": 1, "id": ID}), "invalid", "$.request"),
    "unknown variant": (
        envelope({"RebootInstance": IDS}),
        "unsupported",
        "$.request.RebootInstance",
    ),
    "unknown field": (
        envelope(start(gpu=1)),
        "unsupported",
        "$.request.StartInstance.gpu",
    ),
    "surplus element": (
        envelope({"StopInstance": [*NAMES, None, 1]}),
        "unsupported",
        "$.request.StopInstance[4]",
    ),
    "int for str": (envelope(start(pool_id=7)), "invalid", "$.request.StartInstance.pool_id"),
    "bin for str": (envelope(start(pool_id=b"web")), "invalid", "$.request.StartInstance.pool_id"),
    "int for bool": (
        envelope({"SleepInstance": IDS | {"force": 1}}),
        "invalid",
        "$.request.SleepInstance.force",
    ),
    "negative time": (
        envelope({"SleepInstance": IDS | {"force": False, "drain_timeout_secs": -1}}),
        "invalid",
        "$.request.SleepInstance.drain_timeout_secs",
    ),
    "missing field": (
        envelope({"DestroyInstance": IDS}),
        "invalid",
        "$.request.DestroyInstance.wipe_volumes",
    ),
    "id with a slash": (
        envelope(start(tenant_id="a/b")),
        "invalid",
        "$.request.StartInstance.tenant_id",
    ),
    "id of dots": (envelope(start(pool_id="..")), "invalid", "$.request.StartInstance.pool_id"),
    "id with a newline": (
        envelope(start(instance_id="i-1\n")),
        "invalid",
        "$.request.StartInstance.instance_id",
    ),
    "id of 64": (
        envelope(start(instance_id="a" * 64)),
        "invalid",
        "$.request.StartInstance.instance_id",
    ),
    "empty id": (envelope(start(tenant_id="")), "invalid", "$.request.StartInstance.tenant_id"),
    "another instance's lane": (
        envelope(start(instance_id="i-2")),
        "invalid",
        "$.request.StartInstance.instance_id",
    ),
    "another kind of lane": (
        envelope({"SetupNetwork": {"tenant_id": "acme", "net": NET}}),
        "invalid",
        "$.request.SetupNetwork",
    ),
    "a Ping on an instance's lane": (envelope("Ping"), "invalid", "$.request.Ping"),
    "a reply_to outside": (envelope(start(), reply_to="$SYS.REQ"), "invalid", "$.reply_to"),
    "a reply_to of all": (envelope(start(), reply_to="_INBOX.>"), "invalid", "$.reply_to"),
}


async def dead_letter_of(host: LiveHost, data: bytes) -> tuple[str, dict[str, str]]:
    """ID and headers of the one dead letter with these bytes, once the stream has it."""
    async with asyncio.timeout(20):
        while True:
            kept = await host.kept(host.subjects.dead_stream)
            if found := [headers for _, headers, dead in kept if dead == data]:
                [headers] = found
                return headers["Nats-Msg-Id"], dict(headers)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("name", BAD)
async def test_what_cannot_be_understood_is_answered_put_aside_and_changes_nothing(
    host: LiveHost, name: str
) -> None:
    data, code, path = BAD[name]
    command_id = hashlib.sha256(name.encode()).hexdigest()[:16]
    data = data.replace(ID.encode(), command_id.encode())
    before = await host.inventory()

    await host.publish_raw(host.subjects.command(Lane.instance(REF)), data, command_id)
    key, headers = await dead_letter_of(host, data)
    reply = await host.result(key, timeout_s=20)

    assert key == command_id or (key[:4], reply["detail"]["claimed_id"]) == ("seq:", command_id)
    assert (reply["code"], reply["detail"].get("path")) == (code, path), reply
    assert reply["detail"]["act"] == "sender"
    assert not reply["changed"]
    assert ("supported" in reply) == (code == "unsupported")
    assert await host.replies(key) == [reply]
    assert headers["Hostd-Sha256"] == hashlib.sha256(data).hexdigest()
    assert headers["Hostd-Reason"]
    assert await host.inventory() == before


async def test_a_mebibyte_of_empty_maps_does_not_pass_the_stream(host: LiveHost) -> None:
    for size_bytes in (MESSAGE_MAX_BYTES + 1, 1 << 20):
        with pytest.raises(nats.js.errors.APIError, match="message size exceeds"):
            await host.publish_raw(
                host.subjects.command(Lane.instance(REF)), empty_maps(size_bytes)
            )

    assert (await host.ping())["code"] == "ok"


async def test_another_hosts_commands_are_left_to_it(host: LiveHost) -> None:
    theirs = Subjects(host.settings.root, "another-host", host.settings.host.cell)
    subject = theirs.command(Lane.instance(REF))

    await host.publish_raw(subject, envelope(start(), id="theirs"), "theirs")
    # Ours was sent later: once it is answered, theirs would have been.
    await host.publish(START, "ours")
    assert (await host.result("ours"))["code"] == "not_found"

    assert await host.replies("theirs") == []
    assert subject in [kept for kept, _, _ in await host.kept(host.subjects.commands_stream)]


async def test_an_id_that_cannot_be_read_is_answered_by_the_messages_number(host: LiveHost) -> None:
    await host.publish_raw(host.subjects.command(Lane.instance(REF)), b"\xc1 no id at all")
    key, _ = await dead_letter_of(host, b"\xc1 no id at all")

    reply = await host.result(key)

    assert key.startswith("seq:")
    assert reply["detail"]["claimed_id"].startswith("seq-")
    assert reply["code"] == "invalid"
