"""A command in; reply, event and state out; acknowledged and in their streams."""

import json

from tests.broker.server import HOST, SUBJECTS, Server, consuming_host


async def test_a_command_is_delivered_once_and_removed_after_its_ack(server: Server) -> None:
    async with consuming_host(server) as host:
        await host.command(b"one", msg_id="id-1", lane="network.acme")

        assert await host.receiver.wait_for(b"one", 5)
        delivery = host.receiver.got[0]
        assert delivery.subject == f"{SUBJECTS.root}.{HOST}.cmd.network.acme"
        assert (delivery.msg_id, delivery.stream_seq, delivery.delivered) == ("id-1", 1, 1)
        answer = await host.admin.request(f"$JS.API.STREAM.INFO.{SUBJECTS.commands_stream}", b"")
        assert json.loads(answer.data)["state"]["messages"] == 0


async def test_replies_and_state_are_stored(server: Server) -> None:
    async with consuming_host(server) as host:
        subject = f"{SUBJECTS.root}.{HOST}.reply.host"
        await host.bus.publish(subject, b"reply", msg_id="c-1", headers={"X": "y"})
        await host.bus.publish(subject, b"reply", msg_id="c-1")
        revision = await host.bus.write_state(f"{HOST}.host", b"v1", revision=0)

        assert await host.bus.read_state(f"{HOST}.host") == (b"v1", revision)
        answer = await host.admin.request(f"$JS.API.STREAM.INFO.{SUBJECTS.replies_stream}", b"")
        assert json.loads(answer.data)["state"]["messages"] == 1
        await host.bus.verify()
