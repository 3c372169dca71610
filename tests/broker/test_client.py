"""The client against a real NATS server: lost messages, refusals, feeds. A stand-in answers."""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from schemas import codec
from schemas.codec import request_digest
from schemas.codes import Code
from schemas.envelopes import Command, Event, EventKind, Reply
from schemas.requests import Error, InstanceRef, Ok, Ping, Pong, StartInstance, StopInstance
from schemas.subjects import Lane
from schemas.unpack import pack, unpack_map
from tests.broker.server import CELL, HOST, SUBJECTS, Server, running_server
from tests.broker.test_cli import StandIn, hostd
from tests.broker.test_cli import worker as worker_fixture
from worker.bus.connection import Connection
from worker.bus.protocol import BusError
from worker.client import client as module
from worker.client import errors, link, queries
from worker.client.blocking import BlockingClient
from worker.client.client import HostdClient, new_id
from worker.client.feed import EventFeed

worker = worker_fixture
IDS = ("acme", "web", "i-1")
START = StartInstance(*IDS)
LANE = Lane.of_request(START)
DEAD_S = 30.0


@pytest.fixture
async def client(server: Server) -> AsyncIterator[HostdClient]:
    async with HostdClient.connect(server.url, cell=CELL) as connected:
        yield connected


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for a lost reply soon."""
    monkeypatch.setattr(module, "FIRST_LOOK_S", 0.05)
    monkeypatch.setattr(module, "LOOK_MAX_S", 0.1)


async def keep(worker: StandIn, command_id: str, **more: Any) -> None:
    """Publish a reply to the reply stream, as the worker's outbox does."""
    reply = Reply(
        id=command_id, host_id=HOST, response=Ok(), code=Code.OK, changed=True,
        received_at_ms=1, finished_at_ms=2, **more,
    )  # fmt: skip
    await worker.connection.jetstream().publish(SUBJECTS.reply(LANE), codec.encode_reply(reply))


def event(seq: int, journal_id: str = "j", **more: Any) -> dict[str, Any]:
    raw = Event(
        id=f"{HOST}:{journal_id}:{seq}", host_id=HOST, boot_id="b", journal_id=journal_id, seq=seq,
        at_ms=seq, kind=EventKind.STATUS, tenant_id="acme", pool_id="web", instance_id="i-1",
        to="running",
    )  # fmt: skip
    return {**codec.write_event(raw), **more}


async def soon(feed: EventFeed) -> Event:
    async with asyncio.timeout(DEAD_S):
        return await anext(feed)


async def publish(worker: StandIn, *events: dict[str, Any]) -> None:
    for each in events:
        subject = SUBJECTS.event(LANE, each["kind"])
        await worker.connection.jetstream().publish(subject, pack(each))


# -- commands --------------------------------------------------------------------------------------


async def test_a_command_gets_its_reply_and_names_no_message_id(
    worker: StandIn, client: HostdClient
) -> None:
    worker.reply = {"status": "running"}

    reply = await client.send(HOST, START, timeout_s=DEAD_S, deadline_ms=9, issuer="agentd")

    ((subject, command),) = worker.commands
    assert (reply.id, reply.status, reply.changed) == (command.id, "running", True)
    assert subject == SUBJECTS.command(LANE)
    assert (command.request, command.deadline_ms, command.issuer) == (START, 9, "agentd")
    kept = await worker.connection.jetstream().get_msg(SUBJECTS.commands_stream, 1)
    assert "Nats-Msg-Id" not in (kept.headers or {})


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
async def test_each_code_is_an_exception_that_says_who_must_act(
    worker: StandIn, client: HostdClient, code: Code
) -> None:
    worker.reply = {
        "response": Error("no such luck"), "code": code, "retryable": True,
        "detail": {"act": "scheduler", "path": "$.x"},
    }  # fmt: skip

    with pytest.raises(errors.REFUSALS[code], match="no such luck") as raised:
        await client.send(HOST, START, timeout_s=DEAD_S)

    refused = raised.value
    assert (refused.code, refused.act, refused.retryable) == (code, "scheduler", True)
    assert refused.path == "$.x"
    assert refused.reply is not None
    assert refused.reply.code is code


@pytest.mark.usefixtures("quick")
async def test_a_code_of_a_newer_hostd_is_a_refusal_with_its_reply(
    worker: StandIn, client: HostdClient
) -> None:
    worker.silent = True
    reply = worker.reply_to(Command(id="c-1", request=START))
    newer = {
        **codec.write_reply(reply), "code": "brand_new", "retryable": True,
        "response": {"Error": {"message": "odd"}}, "detail": {"act": "scheduler"},
    }  # fmt: skip
    await worker.connection.jetstream().publish(SUBJECTS.reply(LANE), pack(newer))

    with pytest.raises(errors.BadRefusal, match="odd") as raised:
        await client.send(HOST, START, timeout_s=DEAD_S, command_id="c-1")
    with pytest.raises(errors.BadRefusal):
        await client.kept_reply(HOST, START, "c-1")

    refused = raised.value
    assert (refused.code, refused.act, refused.retryable) == ("brand_new", "scheduler", True)
    assert refused.reply is not None
    assert refused.reply.id == "c-1"


async def test_many_commands_at_once_each_get_their_own_reply(
    worker: StandIn, client: HostdClient
) -> None:
    ids = [new_id() for _ in range(100)]

    replies = await asyncio.gather(
        *(client.send(HOST, Ping(), timeout_s=DEAD_S, command_id=each) for each in ids)
    )

    assert [reply.id for reply in replies] == ids
    assert {type(reply.response) for reply in replies} == {Pong}


@pytest.mark.usefixtures("quick")
async def test_a_reply_that_was_lost_is_read_from_the_reply_stream(
    worker: StandIn, client: HostdClient
) -> None:
    worker.silent = True
    sending = asyncio.create_task(client.send(HOST, START, timeout_s=DEAD_S, command_id="c-1"))
    await keep(worker, "another")
    await keep(worker, "c-1", status="running")

    assert (await sending).status == "running"
    assert len(worker.commands) == 1


@pytest.mark.usefixtures("quick")
async def test_a_reply_that_is_kept_for_another_request_is_a_conflict_without_a_worker(
    worker: StandIn, client: HostdClient
) -> None:
    """Of what was sent it is not the outcome: a worker that forgot the ID runs the command."""
    await keep(worker, "c-1", status="running", request_digest=request_digest(START))
    await worker.connection.drain()
    await client.link.connection.settle()
    other = StopInstance(*IDS)

    with pytest.raises(errors.Conflict, match=r"c-1.*another request.*new ID") as raised:
        await client.kept_reply(HOST, other, "c-1")
    with pytest.raises(errors.NoReply, match=r"another request.*may still run"):
        await client.send(HOST, other, timeout_s=1, command_id="c-1")
    own = await client.send(HOST, START, timeout_s=DEAD_S, command_id="c-1")

    refused = raised.value
    assert (refused.act, refused.path, refused.reply) == ("sender", "$.id", None)
    assert not refused.retryable
    assert own.status == "running"


@pytest.mark.usefixtures("quick")
async def test_one_question_without_an_answer_does_not_end_a_command_that_was_sent(
    worker: StandIn, client: HostdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.silent = True
    await keep(worker, "c-1", status="running", request_digest=request_digest(START))
    stop, asked = StopInstance(*IDS), asyncio.Event()

    async def ask(*_: object, **__: object) -> NoReturn:
        asked.set()
        raise errors.NoAnswer("busy")

    monkeypatch.setattr(client, "ask", ask)
    sending = asyncio.create_task(client.send(HOST, stop, timeout_s=DEAD_S, command_id="c-1"))
    await asyncio.wait(
        (sending, asyncio.ensure_future(asked.wait())), return_when="FIRST_COMPLETED"
    )
    await keep(worker, "c-1", status="stopped", request_digest=request_digest(stop))

    assert (await sending).status == "stopped"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["answer", "reply"])
async def test_a_result_of_another_request_is_a_conflict(
    server: Server, worker: StandIn, client: HostdClient, where: str
) -> None:
    """In the answer also of a command that an older worker ended; else in its reply."""
    worker.silent = True
    done = codec.write_reply(worker.reply_to(Command(id="c-1", request=START)))
    said = {"request_digest": request_digest(START)}
    worker.answers["result"] = {
        "v": 1, "id": "c-1", "state": "done",
        **({"reply": done, **said} if where == "answer" else {"reply": {**done, **said}}),
    }  # fmt: skip

    with pytest.raises(errors.Conflict):
        await client.send(HOST, StopInstance(*IDS), timeout_s=DEAD_S, command_id="c-1")
    with pytest.raises(errors.Conflict):
        await client.kept_reply(HOST, StopInstance(*IDS), "c-1")
    ended = await hostd(server, "stop", *IDS, "--id", "c-1", "--json")
    assert ended.exit_code == 12, ended.output
    assert (await client.kept_reply(HOST, START, "c-1")) is not None


@pytest.mark.usefixtures("quick")
async def test_a_worker_that_runs_says_whether_an_id_is_taken(
    worker: StandIn, client: HostdClient
) -> None:
    """It may have forgotten the ID, and runs what was sent: then its reply counts."""
    worker.silent = True
    worker.answers["result"] = {"error": {"code": "not_found", "message": "not in the journal"}}
    await keep(worker, "c-1", status="running", request_digest=request_digest(START))
    stop = StopInstance(*IDS)

    sending = asyncio.create_task(client.send(HOST, stop, timeout_s=DEAD_S, command_id="c-1"))
    await worker.until(questions=2)
    await keep(worker, "c-1", status="stopped", request_digest=request_digest(stop))

    assert (await sending).status == "stopped"
    assert await client.kept_reply(HOST, stop, "c-1") is not None


@pytest.mark.usefixtures("quick")
async def test_a_reply_of_an_older_worker_is_taken_for_that_of_the_request(
    worker: StandIn, client: HostdClient
) -> None:
    worker.silent = True
    await keep(worker, "c-1", status="running")

    found = await client.send(HOST, StopInstance(*IDS), timeout_s=DEAD_S, command_id="c-1")

    assert (found.status, found.replayed, found.request_digest) == ("running", False, None)


@pytest.mark.usefixtures("quick")
async def test_a_reply_that_was_lost_is_asked_for_in_the_journal(
    worker: StandIn, client: HostdClient
) -> None:
    worker.silent = True
    done = worker.reply_to(Command(id="c-1", request=START))
    worker.answers["result"] = {
        "v": 1, "id": "c-1", "state": "done", "reply": codec.write_reply(done)
    }  # fmt: skip

    assert await client.send(HOST, START, timeout_s=DEAD_S, command_id="c-1") == done
    assert await client.kept_reply(HOST, START, "c-1") == done
    assert len(worker.commands) == 1


@pytest.mark.usefixtures("quick")
async def test_a_command_that_the_worker_does_not_know_is_sent_again_a_bounded_number_of_times(
    worker: StandIn, client: HostdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COPIES_MAX", 3)
    monkeypatch.setattr(module, "LOOK_MAX_S", 0.02)
    worker.silent = True
    worker.answers["result"] = {"error": {"code": "not_found", "message": "not in the journal"}}

    with pytest.raises(errors.NoReply) as raised:
        await client.send(HOST, START, timeout_s=1.5, command_id="c-1")

    assert raised.value.command_id == "c-1"
    copies = [codec.encode_command(command) for _, command in worker.commands]
    assert len(copies) == 4
    assert len(set(copies)) == 1


async def test_after_a_timeout_the_same_id_gets_the_outcome(
    worker: StandIn, client: HostdClient
) -> None:
    worker.silent = True
    with pytest.raises(errors.NoReply, match="send it again under this ID") as raised:
        await client.send(HOST, START, timeout_s=0.2)
    worker.silent = False
    worker.reply = {"replayed": True}

    reply = await client.send(HOST, START, timeout_s=DEAD_S, command_id=raised.value.command_id)

    assert (reply.id, reply.replayed) == (raised.value.command_id, True)


@pytest.mark.usefixtures("quick")
async def test_a_command_outlives_a_crash_of_the_server(
    server: Server, worker: StandIn, client: HostdClient
) -> None:
    worker.silent = True
    sending = asyncio.create_task(client.send(HOST, START, timeout_s=DEAD_S, command_id="c-1"))
    await worker.until(commands=1)
    await server.crash()
    await asyncio.wait_for(worker.connected.wait(), DEAD_S)
    await keep(worker, "c-1", status="running")

    assert (await sending).status == "running"


@pytest.mark.usefixtures("server")
async def test_what_no_stream_takes_is_said_at_once(client: HostdClient) -> None:
    with pytest.raises(errors.NotStored, match="run `hostd provision`"):
        await client.send("h1", START, timeout_s=DEAD_S)


@pytest.mark.usefixtures("quick")
async def test_a_command_whose_first_publication_is_open_is_not_called_not_stored(
    worker: StandIn, client: HostdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.silent = True
    publish_ = client.link.publish
    tries = 0

    async def lossy(subject: str, payload: bytes) -> None:
        nonlocal tries
        tries += 1
        if tries > 1:
            raise errors.NotStored("no stream has a leader")
        await publish_(subject, payload)
        raise errors.NoAnswer("the answer was lost")

    monkeypatch.setattr(client.link, "publish", lossy)

    with pytest.raises(errors.NoReply, match="no stream has a leader"):
        await client.send(HOST, START, timeout_s=0.5)
    assert (tries, len(worker.commands)) == (2, 1)


@pytest.mark.usefixtures("quick")
async def test_what_was_not_sent_for_want_of_a_connection_may_be_not_stored(
    client: HostdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = iter([False, True])
    refusals = iter([errors.NoAnswer("not connected"), errors.NotStored("too large")])

    async def refuse(*_: object) -> None:
        raise next(refusals)

    monkeypatch.setattr(Connection, "connected", property(lambda _: next(connected)))
    monkeypatch.setattr(client.link, "publish", refuse)

    with pytest.raises(errors.NotStored, match="too large"):
        await client.send(HOST, START, timeout_s=5)
    monkeypatch.undo()


@pytest.mark.usefixtures("quick")
async def test_a_copy_that_the_stream_does_not_take_is_no_end_of_the_command_that_it_has(
    worker: StandIn, client: HostdClient
) -> None:
    worker.silent = True
    worker.answers["result"] = {"error": {"code": "not_found", "message": "not in the journal"}}
    jetstream = worker.connection.jetstream()
    config = (await jetstream.stream_info(SUBJECTS.commands_stream)).config
    await jetstream.update_stream(config, max_msgs_per_subject=1)

    sending = asyncio.create_task(client.send(HOST, START, timeout_s=DEAD_S, command_id="c-1"))
    await worker.until(questions=3)  # looked for again after the first copy was refused
    await keep(worker, "c-1", status="running")

    assert (await sending).status == "running"
    kept = await jetstream.stream_info(SUBJECTS.commands_stream)
    assert kept.state.messages == 1


@pytest.mark.usefixtures("quick")
async def test_an_answer_to_a_copy_alone_is_not_the_outcome_of_the_command(
    worker: StandIn, client: HostdClient
) -> None:
    worker.reply = {
        "response": Error("32 copies wait"), "code": Code.EXHAUSTED,
        "detail": {"act": "sender", "path": "$.reply_to"},
    }  # fmt: skip

    sending = asyncio.create_task(client.send(HOST, START, timeout_s=DEAD_S, command_id="c-1"))
    await worker.until(commands=1)
    await keep(worker, "c-1", status="running")

    assert (await sending).status == "running"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("busy_with", ["last", "publish"])
async def test_a_reply_that_arrives_during_something_else_is_taken_at_once(
    worker: StandIn, client: HostdClient, monkeypatch: pytest.MonkeyPatch, busy_with: str
) -> None:
    worker.silent = True
    busy = asyncio.Event()
    do = getattr(client.link, busy_with)

    async def endless(*arguments: Any) -> None:
        if busy_with == "publish":
            await do(*arguments)
        busy.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(client.link, busy_with, endless)
    sending = asyncio.create_task(client.send(HOST, START, timeout_s=DEAD_S))
    await busy.wait()
    await worker.until(commands=1)
    ((_, command),) = worker.commands
    assert command.reply_to is not None
    reply = worker.reply_to(command)
    await worker.connection.publish(command.reply_to, codec.encode_reply(reply))

    assert await asyncio.wait_for(sending, 5) == reply


async def test_a_kept_reply_that_nobody_could_look_for_is_no_answer(
    worker: StandIn, client: HostdClient
) -> None:
    worker.answers["result"] = {"error": {"code": "not_found", "message": "not in the journal"}}
    assert await client.kept_reply(HOST, START, "c-1") is None
    worker.answers["result"] = {"error": {"code": "unavailable", "message": "recovering"}}
    with pytest.raises(errors.NoAnswer, match="c-1: recovering"):
        await client.kept_reply(HOST, START, "c-1")
    with pytest.raises(errors.NoWorker):
        await client.kept_reply("h9", START, "c-1")


async def test_a_command_that_the_server_denies_is_not_stored_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PUBLISH_TIMEOUT_S", 0.5)
    creds = tmp_path / "creds"
    creds.write_text("u:p")
    creds.chmod(0o600)
    config = (
        'authorization {users: [{user: u, password: p, permissions: {publish: {deny: "*.>"}}}]}'
    )
    async with (
        running_server(tmp_path / "nats", config=config) as server,
        HostdClient.connect(server.url, cell=CELL, creds=str(creds)) as client,
    ):
        with pytest.raises(errors.NotStored, match="permissions violation"):
            await client.send("H1", START, timeout_s=DEAD_S)


async def test_a_server_that_is_not_there_is_no_connection() -> None:
    with pytest.raises(errors.NoConnection, match=r"cannot connect to NATS at nats://127.0.0.1:1"):
        async with HostdClient.connect("nats://127.0.0.1:1"):
            pass


@pytest.mark.parametrize(
    "wrong", [{"cell": "a.b"}, {"root": "a.*"}, {"creds": "/no/such"}, {"ca_file": "/no/such"}]
)
async def test_a_setting_that_cannot_be_used_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.BadSetting, match=r"a\.b|a\.\*|/no/such"):
        async with HostdClient.connect("nats://127.0.0.1:1", **wrong):
            pass


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("command_id", ""), ("command_id", "a b"), ("command_id", "x" * 65), ("command_id", "x\n"),
        ("command_id", 7), ("command_id", b"c-1"),
        ("deadline_ms", -1), ("deadline_ms", 1 << 63), ("deadline_ms", 1.5), ("deadline_ms", True),
        ("deadline_ms", "9"), ("timeout_s", 0), ("timeout_s", -1.0), ("timeout_s", "3"),
        ("timeout_s", True), ("timeout_s", float("nan")), ("timeout_s", float("inf")),
    ],
)  # fmt: skip
async def test_an_argument_that_cannot_be_sent_is_named(
    worker: StandIn, client: HostdClient, name: str, value: Any
) -> None:
    passed: dict[str, Any] = {"timeout_s": DEAD_S, name: value}

    with pytest.raises(errors.BadSetting, match=name):
        await client.send(HOST, START, **passed)

    assert worker.commands == []


@pytest.mark.parametrize(
    ("value", "capacity"), [(-1, -1), (1 << 63, 0), (1.5, 1.5), (True, True), ("3", "3")]
)
async def test_a_position_or_capacity_that_cannot_be_is_named(
    client: HostdClient, value: Any, capacity: Any
) -> None:
    with pytest.raises(errors.BadSetting, match="after"):
        await anext(client.stored_events(after=value))
    with pytest.raises(errors.BadSetting, match="capacity"):
        async with client.events(HOST, capacity=capacity):
            pass


async def test_a_host_that_is_none_is_named(client: HostdClient) -> None:
    with pytest.raises(errors.BadSetting, match=r"a\.b"):
        async with client.events("a.b"):
            pass
    with pytest.raises(errors.BadSetting, match=r"a\.b"):
        await anext(client.stored_events("a.b"))


async def test_a_program_waits_for_a_server_that_comes_up_later(server: Server) -> None:
    await server.stop()
    opened = HostdClient.connect(server.url, cell=CELL, timeout_s=DEAD_S)
    connecting = asyncio.ensure_future(opened.__aenter__())
    done, _ = await asyncio.wait((connecting,), timeout=0.3)
    assert not done

    await server.start()
    await connecting
    await opened.__aexit__(None, None, None)


async def test_a_subscription_that_is_not_settled_is_given_up(
    server: Server, client: HostdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unsettled() -> NoReturn:
        raise BusError("PING: timeout")

    connected = client.link.connection.client
    assert connected is not None
    before = len(connected._subs)
    monkeypatch.setattr(client.link.connection, "settle", unsettled)

    with pytest.raises(errors.NoAnswer, match="cannot subscribe"):
        async with client.events(HOST):
            pass

    assert len(connected._subs) == before


# -- queries and state -----------------------------------------------------------------------------


async def test_an_answer_is_typed_and_may_have_more_than_is_known(
    worker: StandIn, client: HostdClient
) -> None:
    worker.answers["list"] = {
        "v": 1, "journal_id": "j", "seq": 7, "networks": [], "new": 1,
        "instances": [{"tenant_id": "a", "pool_id": "b", "instance_id": "c", "status": "running",
                       "since_ms": 5}],
    }  # fmt: skip

    found = await client.ask(HOST, queries.listing())

    assert (found.journal_id, found.seq) == ("j", 7)
    assert found.instances[0].ref == InstanceRef("a", "b", "c")


async def test_a_query_that_is_refused_or_not_answered_says_so(
    worker: StandIn, client: HostdClient
) -> None:
    worker.answers["describe"] = {"error": {"code": "not_found", "message": "no instance"}}
    worker.answers["usage"] = {"error": {"code": "brand_new", "message": "odd"}}
    worker.answers["status"] = {"v": 1}

    with pytest.raises(errors.NotFound, match="no instance"):
        await client.ask(HOST, queries.instance(START.ref))
    with pytest.raises(errors.BadRefusal) as raised:
        await client.ask(HOST, queries.usage(START.ref))
    with pytest.raises(errors.BadAnswer, match=r"\$\.host_id: is missing"):
        await client.ask(HOST, queries.status())
    with pytest.raises(errors.NoWorker):
        await client.ask("h9", queries.ping())

    assert raised.value.code == "brand_new"


async def test_state_is_read_while_no_worker_runs_and_none_once_it_is_deleted(
    worker: StandIn, client: HostdClient
) -> None:
    bucket = await worker.connection.jetstream().key_value(SUBJECTS.state_bucket)
    value = {"v": 1, "status": "running", "journal_id": "j", "seq": 3, "at_ms": 1, "pid": 9}
    await bucket.put(SUBJECTS.state_key(LANE), pack(value))

    found = await client.state(HOST, LANE)
    await bucket.delete(SUBJECTS.state_key(LANE))

    assert found is not None
    assert (found.status, found.journal_id, found.seq) == ("running", "j", 3)
    assert found.fields["pid"] == 9
    assert await client.state(HOST, LANE) is None
    assert await client.state(HOST, Lane.network("none")) is None


# -- events ----------------------------------------------------------------------------------------


async def test_a_list_and_the_events_after_it_have_no_gap_and_no_overlap(
    worker: StandIn, client: HostdClient
) -> None:
    worker.answers["list"] = {
        "v": 1, "journal_id": "j", "seq": 2, "networks": [], "instances": []
    }  # fmt: skip
    async with client.events(HOST) as feed:
        await publish(worker, event(1), event(2), event(3), event(3), event(4))
        feed.after(HOST, await client.ask(HOST, queries.listing()))

        assert [(await soon(feed)).seq for _ in range(2)] == [3, 4]


@pytest.mark.parametrize(
    "then",
    [[event(4)], [event(1, journal_id="k")]],
    ids=["missing", "another journal"],
)
async def test_an_event_that_is_missing_is_an_error(
    worker: StandIn, client: HostdClient, then: list[dict[str, Any]]
) -> None:
    async with client.events(HOST) as feed:
        await publish(worker, event(1), event(2), *then)
        assert [(await soon(feed)).seq for _ in range(2)] == [1, 2]

        with pytest.raises(errors.EventsLost, match="expected j:3"):
            await soon(feed)


async def test_a_kind_of_event_that_is_not_known_yet_is_left_out_and_is_no_gap(
    worker: StandIn, client: HostdClient
) -> None:
    async with client.events(HOST) as feed:
        await publish(worker, event(1), event(2, kind="brand_new"), event(3))

        assert [(await soon(feed)).seq for _ in range(2)] == [1, 3]


async def publish_bad(worker: StandIn) -> None:
    """What no reader can take: no envelope, and an event that says that another host's it is."""
    jetstream = worker.connection.jetstream()
    await jetstream.publish(SUBJECTS.event(LANE, "status"), b"\xc1")
    await publish(worker, event(9, host_id="h2"))


@pytest.mark.parametrize("host", [HOST, "*"])
async def test_an_event_that_cannot_be_read_or_is_of_another_host_than_its_subject_is_left_out(
    worker: StandIn, client: HostdClient, caplog: pytest.LogCaptureFixture, host: str
) -> None:
    async with client.events(host) as feed:
        await publish(worker, event(1))
        await publish_bad(worker)
        await publish(worker, event(2))

        found = [(each.host_id, each.seq) for each in [await soon(feed), await soon(feed)]]
    stored = [each async for each in client.stored_events(host, follow=False)]
    resumed = [
        each async for each in client.stored_events(host, after=1, follow=False)
    ]  # a position before what cannot be read

    assert found == [(HOST, 1), (HOST, 2)]
    assert [each.stream_seq for each in stored] == [1, 4]
    assert [each.stream_seq for each in resumed] == [4]
    assert "cannot decode an event" in caplog.text
    assert "of host 'h2'" in caplog.text


async def test_a_position_beyond_the_end_of_the_stream_is_a_loss(
    worker: StandIn, client: HostdClient
) -> None:
    await publish(worker, event(1))

    assert [each async for each in client.stored_events(after=1, follow=False)] == []
    for follow in (False, True):
        with pytest.raises(errors.EventsLost, match="ends at message 1, before 5"):
            await anext(client.stored_events(after=5, follow=follow))


def _counted_checks(client: HostdClient, monkeypatch: pytest.MonkeyPatch) -> asyncio.Semaphore:
    """Released each time that the client asks where a stream ends."""
    asked = asyncio.Semaphore(0)
    last_seq = client.link.last_seq

    async def counted(stream: str) -> int:
        asked.release()
        return await last_seq(stream)

    monkeypatch.setattr(client.link, "last_seq", counted)
    return asked


async def test_a_stream_that_is_made_anew_is_a_loss_to_who_follows_it(
    worker: StandIn, client: HostdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish(worker, event(1), event(2))
    following = client.stored_events()
    assert [(await anext(following)).stream_seq for _ in range(2)] == [1, 2]
    checks = _counted_checks(client, monkeypatch)
    waiting = asyncio.ensure_future(anext(following))
    for _ in range(2):  # it has been idle for longer than one round
        await asyncio.wait_for(checks.acquire(), DEAD_S)

    jetstream = worker.connection.jetstream()
    config = (await jetstream.stream_info(SUBJECTS.events_stream)).config
    await jetstream.delete_stream(SUBJECTS.events_stream)
    await jetstream.add_stream(config)
    await publish(worker, event(1))

    (end,) = await asyncio.wait_for(asyncio.gather(waiting, return_exceptions=True), DEAD_S)
    if type(end) is errors.NoAnswer:  # it read just then, and goes on from its position
        again = asyncio.ensure_future(anext(client.stored_events(after=2)))
        (end,) = await asyncio.wait_for(asyncio.gather(again, return_exceptions=True), DEAD_S)
    assert isinstance(end, errors.EventsLost)
    assert "ends at message 1, before 2" in end.message


async def test_a_reader_that_is_too_slow_loses_the_feed_and_no_memory(
    worker: StandIn, client: HostdClient
) -> None:
    async with client.events(HOST, capacity=2) as feed:
        await publish(worker, event(1), event(2), event(3), event(4))
        assert [(await soon(feed)).seq for _ in range(2)] == [1, 2]

        with pytest.raises(errors.EventsLost, match="2 messages wait"):
            await soon(feed)


async def test_a_lost_connection_ends_a_feed_and_the_next_one_goes_on(
    server: Server, worker: StandIn, client: HostdClient
) -> None:
    async with client.events(HOST) as feed:
        await publish(worker, event(1))
        assert (await soon(feed)).seq == 1
        await server.crash()

        with pytest.raises(errors.EventsLost, match="the connection was lost"):
            await soon(feed)

    await asyncio.wait_for(client.link.connection.wait_connected(), DEAD_S)
    await asyncio.wait_for(worker.connected.wait(), DEAD_S)
    async with client.events(HOST) as feed:
        await publish(worker, event(2))
        assert (await soon(feed)).seq == 2


async def test_stored_events_resume_after_a_sequence_and_follow(
    worker: StandIn, client: HostdClient
) -> None:
    await publish(worker, event(1), event(2, kind="brand_new"), event(3))
    whole = [each async for each in client.stored_events(HOST, follow=False)]
    resumed = client.stored_events(HOST, after=whole[0].stream_seq)

    found = [await anext(resumed)]
    waiting = asyncio.ensure_future(anext(resumed))
    await asyncio.sleep(0)
    await publish(worker, event(4))
    found.append(await waiting)
    await resumed.aclose()

    assert [each.event.seq for each in whole] == [1, 3]
    assert [(each.stream_seq, each.event.seq) for each in found] == [(3, 3), (4, 4)]


async def test_dead_letters_have_their_reason_and_bytes(
    worker: StandIn, client: HostdClient
) -> None:
    headers = {"Hostd-Reason": "no map", "Nats-Msg-Id": "c-1", "Hostd-Sha256": "ab"}
    await worker.connection.jetstream().publish(
        SUBJECTS.dead(LANE), b"\xc1", headers={**headers, "Hostd-Truncated": "70000"}
    )

    (letter,) = [each async for each in client.dead_letters(HOST)]

    assert (letter.lane, letter.reason, letter.message_id) == (LANE, "no map", "c-1")
    assert (letter.data, letter.truncated_from_bytes) == (b"\xc1", 70000)


# -- without a loop --------------------------------------------------------------------------------


async def test_the_blocking_client_does_the_same_in_a_thread(
    server: Server, worker: StandIn
) -> None:
    worker.answers["list"] = {
        "v": 1, "journal_id": "j", "seq": 0, "networks": [], "instances": []
    }  # fmt: skip
    worker.answers["result"] = {"error": {"code": "not_found", "message": "not in the journal"}}
    await publish(worker, event(1))

    def work() -> list[Any]:
        with BlockingClient.connect(server.url, cell=CELL) as client:
            found: list[Any] = [client.send(HOST, Ping(), timeout_s=DEAD_S).code]
            found += [each.event.seq for each in client.stored_events(HOST, follow=False)]
            with client.events(HOST) as feed:
                feed.after(HOST, client.ask(HOST, queries.listing()))
                with pytest.raises(TimeoutError):
                    feed.take(timeout_s=0.05)
                client.send(HOST, START, timeout_s=DEAD_S)
                found.append(next(feed).seq)
            found += [client.state(HOST, LANE), list(client.dead_letters(HOST))]
            return [*found, client.kept_reply(HOST, START, "none")]

    sent: list[asyncio.Task[None]] = []
    answer = worker.reply_to

    def reply_to(command: Command) -> Reply:
        if command.request == START:
            sent.append(asyncio.create_task(publish(worker, event(1))))
        return answer(command)

    worker.reply_to = reply_to  # type: ignore[method-assign]

    assert await asyncio.to_thread(work) == [Code.OK, 1, 1, None, [], None]


async def test_the_blocking_client_says_what_is_wrong_and_leaves_no_thread(
    server: Server, worker: StandIn
) -> None:
    def work() -> None:
        with BlockingClient.connect(server.url, cell=CELL) as client:
            client.ask("h9", queries.ping())

    with pytest.raises(errors.NoWorker):
        await asyncio.to_thread(work)
    with pytest.raises(errors.NoConnection):
        await asyncio.to_thread(
            lambda: BlockingClient.connect("nats://127.0.0.1:1", timeout_s=1).__enter__()
        )


async def test_calls_of_other_threads_end_with_the_blocking_client(
    server: Server, worker: StandIn
) -> None:
    worker.silent = True
    opened = BlockingClient.connect(server.url, cell=CELL)
    client = await asyncio.to_thread(opened.__enter__)
    waiting = asyncio.create_task(asyncio.to_thread(client.send, HOST, START, timeout_s=DEAD_S))
    with_events = client.events(HOST)
    await asyncio.to_thread(with_events.__enter__)
    await worker.until(commands=1)

    await asyncio.to_thread(opened.__exit__, None, None, None)

    with pytest.raises(errors.NoConnection, match="closed during the call"):
        await waiting
    with pytest.raises(errors.NoConnection, match="is closed"):
        client.ask(HOST, queries.ping())
    with_events.__exit__(None, None, None)


def test_a_thread_without_an_event_loop_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_loop() -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(asyncio, "new_event_loop", no_loop)
    monkeypatch.setattr(asyncio.events, "new_event_loop", no_loop)

    with (
        pytest.raises(errors.NoConnection, match="too many open files"),
        BlockingClient.connect("nats://127.0.0.1:1"),
    ):
        pass


def test_ids_are_uuids_that_sort_by_time() -> None:
    first, second = new_id(), new_id()

    assert first[14] == second[14] == "7"
    assert first[:8] <= second[:8]
    assert unpack_map(codec.encode_command(Command(id=first, request=START)))["id"] == first
