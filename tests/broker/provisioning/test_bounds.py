"""What happens at the bounds of the streams, and what one host can do to another one's messages."""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from schemas.settings import NatsSettings
from tests.broker.provisioning.test_permissions import H1, H2, Roles, roles
from tests.broker.provisioning.test_provision import api
from tests.broker.server import HOST, QUICK, SUBJECTS, Server, connection_to, consuming_host
from tests.broker.test_cli import hostd
from worker.bus import streams
from worker.bus.nats import NatsBus
from worker.bus.protocol import BusError
from worker.bus.provision import provision

__all__ = ["roles"]
REPLY = f"{H1.root}.h1.reply.host"


async def kept(roles: Roles, stream: str) -> list[tuple[str, str, bytes]]:
    """Subject, message ID and payload of each message."""
    admin = await roles.role("admin")
    info = await api(admin, f"STREAM.INFO.{stream}")
    found: list[tuple[str, str, bytes]] = []
    for sequence in range(info["state"]["first_seq"], info["state"]["last_seq"] + 1):
        message = await admin.request(
            f"$JS.API.DIRECT.GET.{stream}", json.dumps({"seq": sequence}).encode()
        )
        headers = message.headers
        found.append((headers["Nats-Subject"], headers.get("Nats-Msg-Id", ""), message.data))
    return found


# -- message IDs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reply", "dead"])
async def test_another_host_cannot_suppress_a_message_by_its_id(roles: Roles, kind: str) -> None:
    bus, other = await roles.host(H1), await roles.host(H2)
    await bus.verify()
    theirs = f"{H1.root}.h2.{kind}.host"
    ours = f"{H1.root}.h1.{kind}.host"
    await other.connection.request(theirs, b"forged", headers={"Nats-Msg-Id": "c1"})
    await bus.publish(ours, b"later, so that the forged one is not the last", msg_id="c0")

    for _ in range(2):  # again, as after a lost PubAck
        await bus.publish(ours, b"mine", msg_id="c1")

    stream = streams.stream_of(H1, ours)
    assert stream is not None
    mine = [found for found in await kept(roles, stream) if found[2] == b"mine"]
    assert [subject for subject, _, _ in mine] == [ours]
    assert re.fullmatch(r"c1:[0-9a-f]{32}", mine[0][1])
    assert bus.taken_msg_ids == 1


async def test_a_copy_of_our_own_is_not_published_twice(roles: Roles) -> None:
    first = await roles.host(H1)
    await first.verify()
    for number in range(3):
        await first.publish(REPLY, f"r{number}".encode(), msg_id=f"c{number}")
    restarted = await roles.host(H1)
    await restarted.verify()

    for number in range(3):  # the rows of a journal whose worker was killed before the PubAcks
        await restarted.publish(REPLY, f"r{number}".encode(), msg_id=f"c{number}")

    found = await kept(roles, H1.replies_stream)
    assert [(msg_id, data) for _, msg_id, data in found] == [
        ("c0", b"r0"),
        ("c1", b"r1"),
        ("c2", b"r2"),
    ]
    assert restarted.taken_msg_ids == 0


async def test_a_message_sent_again_after_a_lost_answer_is_our_own(server: Server) -> None:
    async with consuming_host(server) as host:
        subject = f"{SUBJECTS.root}.{HOST}.reply.host"
        bus = host.bus
        await bus.verify()
        server.pause()
        with pytest.raises(BusError):
            await bus.publish(subject, b"r1", msg_id="c1")
        server.go_on()
        async with asyncio.timeout(20):
            for body, msg_id in ((b"r2", "c2"), (b"r1", "c1")):
                while True:  # as the outbox does
                    try:
                        await bus.publish(subject, body, msg_id=msg_id)
                        break
                    except BusError:
                        await asyncio.sleep(0.02)
            await host.admin.wait_connected()  # the pause may have ended its connection, too

        info = await api(host.admin, f"STREAM.INFO.{SUBJECTS.replies_stream}")
        assert (info["state"]["messages"], bus.taken_msg_ids) == (2, 0)


# -- headers of the server -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    ["Nats-Stream", "nats-subject", "Nats-Sequence", "Nats-Last-Sequence", "Nats-Time-Stamp"],
)
async def test_a_command_with_a_servers_header_is_seen_as_a_copy(
    server: Server, header: str
) -> None:
    async with consuming_host(server) as host:
        subject = f"{SUBJECTS.root}.{HOST}.cmd.host"
        await host.admin.request(subject, b"x", headers={header: "1"})

        assert await host.receiver.wait_for(b"x", 5)
        assert host.receiver.got[0].server_headers == (header.lower(),)


# -- rollup ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "sub"])
async def test_no_host_deletes_the_state_of_others_by_a_rollup(roles: Roles, scope: str) -> None:
    bus, other = await roles.host(H1), await roles.host(H2)
    await other.write_state("h2.host", b"theirs", revision=0)

    answer = await bus.connection.request(
        "$KV.HOSTD_STATE_default.h1.host", b"x", headers={"Nats-Rollup": scope}
    )

    assert "rollup" in json.loads(answer.data)["error"]["description"]
    assert (await other.read_state("h2.host") or (b"", 0))[0] == b"theirs"


# -- sizes -----------------------------------------------------------------------------------------

SMALL = {"cmd": 1, "evt": 1, "reply": 1, "dead": 1, "state": 1}
BODY = b"x" * 60_000


@pytest.mark.parametrize("kind", ["evt", "reply", "dead"])
async def test_a_full_stream_drops_its_oldest_messages(server: Server, kind: str) -> None:
    async with connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST], sizes_mib=SMALL)
        subject = f"{SUBJECTS.root}.{HOST}.{kind}.host"
        for _ in range(30):
            assert b'"seq"' in (await admin.request(subject, BODY)).data

        stream = streams.stream_of(SUBJECTS, subject)
        state = (await api(admin, f"STREAM.INFO.{stream}"))["state"]
        assert state["bytes"] <= 1 << 20
        assert (state["last_seq"], state["messages"]) == (30, 17)


@pytest.mark.parametrize("kind", ["cmd", "state"])
async def test_a_full_work_queue_or_bucket_refuses_new_messages(server: Server, kind: str) -> None:
    async with connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST], sizes_mib=SMALL)
        answers: list[Mapping[str, Any]] = []
        for number in range(30):
            lane = f"instance.t.p.i{number}"
            subject = f"{SUBJECTS.root}.{HOST}.cmd.{lane}"
            if kind == "state":
                subject = streams.state_subject(SUBJECTS, f"{HOST}.{lane}")
            answers.append(json.loads((await admin.request(subject, BODY)).data))

        stored = [answer for answer in answers if "error" not in answer]
        refused = {answer["error"]["description"] for answer in answers if "error" in answer}
        assert (len(stored), refused) == (17, {"maximum bytes exceeded"})


async def test_a_full_bucket_is_an_error_of_the_bus(server: Server) -> None:
    async with connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST], sizes_mib=SMALL)
        bus = NatsBus(NatsSettings(url=server.url), SUBJECTS, tuning=QUICK)
        await bus.start()
        try:
            await asyncio.wait_for(bus.connection.wait_connected(), 10)
            for number in range(17):
                await bus.write_state(f"{HOST}.instance.t.p.i{number}", BODY, revision=0)
            with pytest.raises(BusError, match="maximum bytes"):
                await bus.write_state(f"{HOST}.host", BODY, revision=0)
        finally:
            await bus.close()


async def test_one_lane_has_a_bound_of_its_own_in_the_work_queue(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LANE_MESSAGES", 3)
    async with connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST])
        base = f"{SUBJECTS.root}.{HOST}.cmd.instance.t.p"
        answers = [json.loads((await admin.request(f"{base}.i1", b"x")).data) for _ in range(4)]
        other = json.loads((await admin.request(f"{base}.i2", b"x")).data)

        assert answers[3]["error"]["description"] == "maximum messages per subject exceeded"
        assert "error" not in other


async def test_provision_takes_sizes(server: Server) -> None:
    done = await hostd(server, "provision", "--size", "evt=7", "--size", "state=9", "--json")

    assert done.exit_code == 0, done.output
    async with connection_to(server.url) as admin:
        sizes: dict[str, int] = {}
        for config in streams.stream_configs(SUBJECTS):
            info = await api(admin, f"STREAM.INFO.{config['name']}")
            sizes[config["name"]] = info["config"]["max_bytes"] >> 20
    assert list(sizes.values()) == [512, 7, 1024, 256, 9]


@pytest.mark.parametrize("size", ["evt", "evt=0", "evt=-1", "evt=1.5", "x=1", "evt=99999999999999"])
async def test_provision_refuses_an_invalid_size(server: Server, size: str) -> None:
    done = await hostd(server, "provision", "--size", size)

    assert (done.exit_code, f"invalid --size '{size}'" in done.output) == (2, True)
