"""Reading an ack subject, in the forms of both server versions."""

import pytest

from schemas.settings import NatsSettings
from worker.bus.connection import Connection
from worker.bus.message import Message
from worker.bus.protocol import Delivery
from worker.bus.pull_consumer import to_delivery


@pytest.mark.parametrize(
    "reply",
    [
        "$JS.ACK.HOSTD_CMD_test.h1.3.17.40.1700000000000000000.0",
        "$JS.ACK.hub.ACCHASH.HOSTD_CMD_test.h1.3.17.40.1700000000000000000.0",
        "$JS.ACK._.ACCHASH.HOSTD_CMD_test.h1.3.17.40.1700000000000000000.0.random",
    ],
)
def test_both_forms_of_ack_subjects_are_read(reply: str) -> None:
    connection = Connection(NatsSettings(), name="t", inbox="_INBOX.t")

    got: Delivery = to_delivery(Message("s", reply, b"x", {"nats-msg-id": "id-1"}), connection)

    assert (got.delivered, got.stream_seq, got.msg_id) == (3, 17, "id-1")
