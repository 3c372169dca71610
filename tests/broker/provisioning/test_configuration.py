"""A stream or consumer that differs in any field: not ready, nothing lost, and repaired.

The server is ready and the connection up in all of these; only the configuration says that no
commands, or commands without content, will arrive.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.broker.provisioning.test_provision import api
from tests.broker.server import HOST, QUICK, SUBJECTS, Host, Server, consuming_host, eventually
from worker.bus import streams
from worker.bus.provision import provision

STREAM = SUBJECTS.commands_stream
CONSUMER = f"{STREAM}.{HOST}"
CONSUMER_EDITS: Mapping[str, Any] = {
    "filter_subject": f"{SUBJECTS.root}.h9.cmd.>",
    "headers_only": True,
    "max_deliver": 3,
    "max_batch": 1,
    "max_expires": 1_000_000_000,
    "max_bytes": 1,
    "inactive_threshold": 3600 * streams.NS,
    "pause_until": "2099-01-01T00:00:00Z",
    "backoff": [streams.NS],
    "replay_policy": "original",
    "deliver_subject": "somewhere",
}
STREAM_EDITS: Mapping[str, Mapping[str, Any]] = {
    "cmd republish": {"republish": {"src": ">", "dest": "copies.>"}},
    "cmd discard": {"discard": "old", "discard_new_per_subject": False},
    "cmd subject_transform": {
        "subject_transform": {"src": f"{SUBJECTS.root}.*.cmd.>", "dest": f"{SUBJECTS.root}.x.cmd.>"}
    },
    "cmd max_msgs_per_subject": {"max_msgs_per_subject": 1},
    "cmd allow_rollup_hdrs": {"allow_rollup_hdrs": True},
    "evt no_ack": {"no_ack": True},
    "evt subjects": {"subjects": [f"{SUBJECTS.root}.h9.evt.>"]},
    "evt allow_direct": {"allow_direct": False},
    "reply allow_rollup_hdrs": {"allow_rollup_hdrs": True},
    "dead republish": {"republish": {"src": ">", "dest": "copies.>"}},
    "state allow_rollup_hdrs": {"allow_rollup_hdrs": True},
    "state max_msgs_per_subject": {"max_msgs_per_subject": 9},
}
NAMES = {
    "cmd": STREAM,
    "evt": SUBJECTS.events_stream,
    "reply": SUBJECTS.replies_stream,
    "dead": SUBJECTS.dead_stream,
    "state": streams.bucket_stream(SUBJECTS),
}


async def edit_consumer(host: Host, field: str) -> None:
    """Change it as an administrator would; where the server refuses, delete it and make it so."""
    if field == "pause_until":
        paused = await api(host.admin, f"CONSUMER.PAUSE.{CONSUMER}", {field: CONSUMER_EDITS[field]})
        assert paused["paused"]
        return
    found = (await api(host.admin, f"CONSUMER.INFO.{CONSUMER}"))["config"]
    config = {**found, field: CONSUMER_EDITS[field]}
    if field == "deliver_subject":
        config.pop("max_waiting")
    body = {"stream_name": STREAM, "config": config}
    answer = await api(host.admin, f"CONSUMER.DURABLE.CREATE.{CONSUMER}", body)
    if "error" in answer:
        await api(host.admin, f"CONSUMER.DELETE.{CONSUMER}")
        answer = await api(host.admin, f"CONSUMER.DURABLE.CREATE.{CONSUMER}", body)
    if "error" in answer:
        pytest.fail(f"{field}: {answer['error']}")


@pytest.mark.parametrize("field", CONSUMER_EDITS)
async def test_an_edited_consumer_is_reported_repaired_and_loses_no_command(
    server: Server, field: str
) -> None:
    async with consuming_host(server) as host:
        await host.command(b"before")
        assert await host.receiver.wait_for(b"before", 5)

        await edit_consumer(host, field)
        await host.command(b"meanwhile")

        assert await eventually(lambda: field in host.bus.trouble, 10)
        assert "Run `hostd provision`" in host.bus.trouble
        made = await provision(host.admin, SUBJECTS, [HOST], ack_wait_ns=500_000_000)
        assert made[-1].how in ("changed", "remade")
        assert field in made[-1].detail
        assert await host.receiver.wait_for(b"meanwhile", 10)
        assert await eventually(lambda: host.bus.trouble == "", 10)
        assert set(host.receiver.bodies) == {b"before", b"meanwhile"}
        again = await provision(host.admin, SUBJECTS, [HOST], ack_wait_ns=500_000_000)
        assert {one.how for one in again} == {"found"}


@pytest.mark.parametrize("edit", STREAM_EDITS)
async def test_an_edited_stream_is_reported_and_repaired(server: Server, edit: str) -> None:
    kind, field = edit.split()
    name = NAMES[kind]
    async with consuming_host(server) as host:
        found = (await api(host.admin, f"STREAM.INFO.{name}"))["config"]
        answer = await api(host.admin, f"STREAM.UPDATE.{name}", {**found, **STREAM_EDITS[edit]})
        assert "error" not in answer, answer

        assert await eventually(lambda: f"stream {name}: {field}" in host.bus.trouble, 10)

        made = await provision(host.admin, SUBJECTS, [HOST], ack_wait_ns=500_000_000)
        what = f"bucket {name.removeprefix('KV_')}" if name.startswith("KV_") else f"stream {name}"
        assert [one.what for one in made if one.how == "changed"] == [what]
        assert await eventually(lambda: host.bus.trouble == "", 10)
        await host.command(b"after")
        assert await host.receiver.wait_for(b"after", 5)


async def test_a_command_that_only_looks_headers_only_does_not_come_for_ever(
    server: Server,
) -> None:
    async with consuming_host(server) as host:
        subject = f"{SUBJECTS.root}.{HOST}.cmd.host"
        forged = {"Nats-Msg-Size": "5"}
        assert b'"seq"' in (await host.admin.request(subject, b"", headers=forged)).data

        assert await host.receiver.wait_for(b"", 10)
        await host.command(b"after")
        assert await host.receiver.wait_for(b"after", 5)
        assert host.bus.trouble == ""


async def test_an_advisory_is_enough(server: Server) -> None:
    tuning = replace(QUICK, check_s=3600)
    async with consuming_host(server, tuning=tuning) as host:
        await host.command(b"before")
        assert await host.receiver.wait_for(b"before", 5)

        await edit_consumer(host, "pause_until")

        assert await eventually(lambda: "pause_until" in host.bus.trouble, 10)


async def test_what_an_administrator_may_tune_is_left_alone_by_the_worker(server: Server) -> None:
    async with consuming_host(server) as host:
        name = SUBJECTS.events_stream
        found = (await api(host.admin, f"STREAM.INFO.{name}"))["config"]
        tuned = {**found, "max_age": 3600 * streams.NS, "description": "mine"}
        assert "error" not in await api(host.admin, f"STREAM.UPDATE.{name}", tuned)

        await host.bus.verify()
        await provision(host.admin, SUBJECTS, [HOST], ack_wait_ns=500_000_000)

        config = (await api(host.admin, f"STREAM.INFO.{name}"))["config"]
        assert (config["max_age"], config["description"]) == (7 * streams.DAY_NS, "mine")
