"""From bytes on a subject to exactly one effect and one reply per id, or one clear refusal."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import msgpack
import pytest

from handlers.clock import now_ms
from handlers.steps import Done
from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Form, Reply
from schemas.requests import Error, Ok, Ping, Pong, Request, SleepInstance
from schemas.settings import LimitSettings
from schemas.subjects import Lane
from tests.fakes.shell_worker import (
    REF,
    SUBJECTS,
    FakeHandlers,
    ShellWorker,
    command,
    shell_worker,
    start,
    stop,
)
from tests.plain import unpacked
from worker.journal.admission import JOINERS_MAX
from worker.journal.writer import JournalFault

LANE = "instance.acme.web.a1"
CMD = f"hostd.v1.test.h1.cmd.{LANE}"


def envelope(**changes: Any) -> dict[str, Any]:
    """A good command in plain objects, with some of it changed."""
    good: dict[str, Any] = unpacked(codec.encode_command(command(start(), reply_to="_INBOX.1")))
    return {**good, **changes}


async def only_reply(worker: ShellWorker) -> Reply:
    await worker.bus.until(replies=1)
    await worker.bus.until_acked()
    (reply,) = worker.replies()
    return reply


# -- once ------------------------------------------------------------------------------------------


async def test_a_command_is_run_answered_and_announced(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start(), reply_to="_INBOX.1")
        reply = await only_reply(worker)
        await worker.bus.until(events=1, sent=1)

        assert (reply.code, reply.response, reply.changed) == (Code.OK, Ok(), True)
        assert worker.machine.things.made == ["acme/web/a1"]
        assert worker.bus.sent_to("_INBOX.1") == [worker.bus.replies()[0].payload]
        assert [(e.seq, e.kind, e.command_id) for e in worker.events()] == [(1, "command", "c1")]
        assert worker.bus.events()[0].subject == f"hostd.v1.test.h1.evt.{LANE}.command"


@pytest.mark.parametrize("msg_id", [False, True])
@pytest.mark.parametrize("copies", [2, 10])
async def test_copies_sent_at_once_have_one_effect_and_one_kept_reply(
    tmp_path: Path, copies: int, msg_id: bool
) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        for n in range(copies):
            worker.send(start(), reply_to=f"_INBOX.{n}", msg_id=msg_id)
        await machine.at_gate.wait()
        await worker.bus.until_acked()
        gate.set()
        told = 1 if msg_id else copies  # the server swallows what has a known Nats-Msg-Id
        await worker.bus.until(replies=1, sent=told)

        assert machine.things.made == ["acme/web/a1"]
        assert machine.runs == [("c1", "StartInstance")]
        (kept,) = worker.bus.replies()
        assert (kept.msg_id, len(worker.bus.sent)) == ("c1", told)
        assert worker.bus.sent_to("_INBOX.0") == [kept.payload]
        copies_sent = [data for to, data in worker.bus.sent if to != "_INBOX.0"]
        assert set(copies_sent) <= {codec.mark_replayed(kept.payload)}


@pytest.mark.parametrize("msg_id", [False, True])
async def test_a_copy_after_a_restart_gets_the_stored_reply_even_past_its_deadline(
    tmp_path: Path, msg_id: bool
) -> None:
    deadline = now_ms() + 60_000
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start(), reply_to="_INBOX.1", msg_id=msg_id, deadline_ms=deadline)
        await worker.bus.until(replies=1, sent=1, events=1)
        bus, machine = worker.bus, worker.machine
    bus.dedupe_commands = False  # the server's window has passed
    async with shell_worker(tmp_path / "j", bus, machine) as worker:
        worker.send(start(), reply_to="_INBOX.2", msg_id=msg_id, deadline_ms=1)
        await bus.until(sent=2)
        await bus.until_acked()

        (kept,) = bus.replies()
        assert bus.sent_to("_INBOX.2") == [codec.mark_replayed(kept.payload)]
        assert len(machine.runs) == 1


async def test_a_redelivered_message_is_acknowledged_and_not_answered_twice(
    tmp_path: Path,
) -> None:
    async with shell_worker(tmp_path / "j", consume=False) as worker:
        worker.send(start(), reply_to="_INBOX.1")
        worker.bus.up = False
        await worker.intake.receive(worker.bus.delivery(1))
        assert list(worker.bus.commands) == [1]  # the acknowledgement was lost
        worker.bus.up = True
        await worker.intake.receive(worker.bus.delivery(1))
        await worker.bus.until(replies=1, sent=1)

        assert worker.bus.commands == {}
        assert (len(worker.machine.runs), len(worker.bus.sent)) == (1, 1)
        assert worker.meters.redeliveries == 1


async def test_the_same_id_with_another_request_is_a_conflict_sent_to_its_sender_only(
    tmp_path: Path,
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start(), reply_to="_INBOX.1")
        await worker.bus.until(replies=1, sent=1)
        worker.send(stop(), reply_to="_INBOX.2")
        await worker.bus.until(sent=2)

        reply = codec.decode_reply(worker.bus.sent_to("_INBOX.2")[0])
        assert (reply.code, reply.id, reply.detail["path"]) == (Code.CONFLICT, "c1", "$.id")
        assert reply.request_digest == codec.request_digest(stop())
        assert len(worker.bus.replies()) == 1
        assert worker.bus.dead() == []
        assert worker.machine.things.there == {"acme/web/a1"}


async def test_each_reply_says_which_request_it_answers(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j", limits=LimitSettings(lane_depth=1)) as worker:
        late = now_ms() - 1
        sent: dict[str, Request] = {"done": start(), "expired": start("a2"), "ping": Ping()}
        worker.machine.gate = asyncio.Event()
        worker.send(sent["done"], "done")
        await worker.machine.at_gate.wait()
        worker.send(sent["expired"], "expired", deadline_ms=late, form=Form.COMPACT)
        worker.send(sent["ping"], "ping")
        sent["full"] = SleepInstance("acme", "web", "a1", force=True)
        worker.send(sent["full"], "full")
        worker.bus.command(CMD, msgpack.packb(envelope(id="unread", request={"Grow": {}})))
        sent["inbox"] = sent["lane"] = sent["copied"] = stop("a3")
        worker.send(sent["inbox"], "inbox", reply_to="elsewhere.1")
        worker.bus.command(CMD, codec.encode_command(command(sent["lane"], "lane")))
        copied = codec.encode_command(command(sent["copied"], "copied"))
        subject = SUBJECTS.command(Lane.of_request(sent["copied"]))
        worker.bus.command(subject, copied, server_headers=("Nats-Stream-Source",))
        await worker.bus.until(replies=7)
        worker.machine.gate.set()
        await worker.bus.until(replies=8)

        digests = {reply.id: reply.request_digest for reply in worker.replies()}
        assert digests.pop("unread") is None
        assert digests == {key: codec.request_digest(each) for key, each in sent.items()}
        kept = {p.msg_id: p.payload for p in worker.bus.replies()}
        assert "request_digest" not in unpacked(kept["unread"])


async def test_a_copy_beyond_the_limit_is_answered_as_a_copy_and_not_as_the_command(
    tmp_path: Path,
) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start(), reply_to="_INBOX.first")
        await machine.at_gate.wait()
        for n in range(JOINERS_MAX + 1):
            worker.send(start(), reply_to=f"_INBOX.{n}")
        await worker.bus.until(sent=1)

        (answer,) = (codec.decode_reply(data) for _, data in worker.bus.sent)
        assert (answer.code, answer.detail["path"]) == (Code.EXHAUSTED, "$.reply_to")
        assert not answer.retryable  # a new ID would be a second command
        gate.set()
        await worker.bus.until(replies=1, sent=JOINERS_MAX + 2)
        assert machine.things.made == ["acme/web/a1"]


async def test_the_answer_has_the_form_of_the_request(tmp_path: Path) -> None:
    machine = FakeHandlers()
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        late = now_ms() - 1
        worker.send(start(), "named", deadline_ms=late)
        worker.send(start(), "compact", deadline_ms=late, form=Form.COMPACT)
        await worker.bus.until(replies=2)

        raw = {p.msg_id: unpacked(p.payload)["response"] for p in worker.bus.replies()}
        assert isinstance(raw["named"]["Error"], dict)
        assert isinstance(raw["compact"]["Error"], list)


async def test_two_requests_under_one_id_at_once_are_one_command_and_one_conflict(
    tmp_path: Path,
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start(), reply_to="_INBOX.1")
        worker.send(stop(), reply_to="_INBOX.2")
        await worker.bus.until(replies=1, sent=2)

        (told,) = worker.bus.sent_to("_INBOX.2")
        assert codec.decode_reply(told).code is Code.CONFLICT
        assert [run[1] for run in worker.machine.runs] == ["StartInstance"]


async def test_what_cannot_be_journalled_though_it_can_be_written_is_tried_with_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        take_in, refused = worker.journal.commands.take_in, list[str]()

        async def unreadable(command: Command, **_: object) -> Any:
            refused.append(command.id)
            raise JournalFault("cannot read the journal")

        monkeypatch.setattr(worker.journal.commands, "take_in", unreadable)
        worker.send(start())
        turns = 0
        while len(refused) < 3:
            turns += 1
            await asyncio.sleep(0)
        assert turns > 20  # of the loop, for others

        monkeypatch.setattr(worker.journal.commands, "take_in", take_in)
        assert (await only_reply(worker)).code is Code.OK


async def test_a_command_that_changes_nothing_costs_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = Done(changed=False, status="stopped", detail={})
    async with shell_worker(
        tmp_path / "j", machine=FakeHandlers(behave=lambda _request, _steps: same)
    ) as worker:
        commits: list[float] = []
        monkeypatch.setattr(worker.journal.store.writer, "_observe", commits.append)
        worker.send(stop())
        reply = await only_reply(worker)

        assert (reply.code, reply.changed, len(commits)) == (Code.OK, False, 1)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "subject", "code", "path"),
    [
        (envelope(v=2), CMD, Code.INVALID, "$.v"),
        (envelope(request={"Grow": {}}), CMD, Code.UNSUPPORTED, "$.request.Grow"),
        (envelope(request="Ping"), CMD, Code.INVALID, "$.request.Ping"),
        (envelope(), CMD.replace("a1", "a2"), Code.INVALID,
         "$.request.StartInstance.instance_id"),
        (envelope(), CMD + ".more", Code.INVALID, "subject"),
        (envelope(), CMD.replace("h1", "h2"), Code.INVALID, "subject"),
        (envelope(v=2), CMD.replace("h1", "h2"), Code.INVALID, "subject"),
        (envelope(deadline_ms=-1), CMD, Code.INVALID, "$.deadline_ms"),
    ],
)  # fmt: skip
async def test_an_invalid_message_is_answered_kept_as_dead_letter_and_has_no_effect(
    tmp_path: Path, data: dict[str, Any], subject: str, code: Code, path: str
) -> None:
    packed = msgpack.packb(data)
    async with shell_worker(tmp_path / "j") as worker:
        worker.bus.command(subject, packed)
        reply = await only_reply(worker)
        await worker.bus.until(sent=1)

        (kept,), (direct,) = worker.bus.replies(), worker.bus.sent_to("_INBOX.1")
        valid = data["v"] == 1 and path != "$.deadline_ms"  # the envelope, and so its ID
        key = "c1" if valid else f"seq:1:{hashlib.sha256(packed).hexdigest()[:12]}"
        assert (reply.id, kept.msg_id, reply.code, reply.detail["path"]) == (key, key, code, path)
        assert reply.detail.get("claimed_id") == (None if valid else "c1")
        assert codec.decode_reply(direct).id == "c1"
        assert isinstance(reply.response, Error)
        assert reply.supported == (("1", "2") if code is Code.UNSUPPORTED else ())
        (dead,) = worker.bus.dead()
        assert (dead.payload, dead.msg_id) == (packed, key)
        assert dead.headers["Hostd-Sha256"] == hashlib.sha256(packed).hexdigest()
        assert path in dead.headers["Hostd-Reason"]
        assert worker.machine.runs == []


async def test_a_command_that_a_server_copied_is_refused(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        data = msgpack.packb(envelope())
        worker.bus.command(CMD, data, None, ("nats-sequence", "nats-stream"))
        reply = await only_reply(worker)

        assert (reply.code, reply.detail["path"]) == (Code.INVALID, "headers")
        assert isinstance(reply.response, Error)
        assert "nats-sequence, nats-stream" in reply.response.message
        assert [letter.payload for letter in worker.bus.dead()] == [data]
        assert worker.machine.runs == []


@pytest.mark.parametrize("reply_to", ["hostd.v1.test.h2.cmd.host", "_INBOX.*", "_INBOX.>", "a b"])
async def test_hostd_publishes_only_to_allowed_inboxes(tmp_path: Path, reply_to: str) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start(), reply_to=reply_to)
        reply = await only_reply(worker)

        assert (reply.code, reply.detail["path"]) == (Code.INVALID, "$.reply_to")
        assert worker.bus.sent == []
        assert len(worker.bus.dead()) == 1
        assert worker.machine.runs == []


@pytest.mark.parametrize("msg_id", ["m-1", None, "not an id"])
async def test_bytes_without_an_id_are_answered_with_the_id_of_the_message(
    tmp_path: Path, msg_id: str | None
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.bus.command(CMD, b"\xc1 no msgpack", msg_id)
        reply = await only_reply(worker)

        assert reply.id.startswith("seq:1:")
        assert reply.detail["claimed_id"] == ("m-1" if msg_id == "m-1" else "seq-1")
        assert reply.code is Code.INVALID
        assert len(worker.bus.dead()) == 1
        assert worker.bus.replies()[0].subject == f"hostd.v1.test.h1.reply.{LANE}"


async def test_a_bomb_of_empty_maps_is_refused_and_the_next_command_runs(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.bus.command(CMD, b"\xdd\x00\x10\x00\x00" + b"\x80" * 2**20)
        worker.send(start())

        assert (await worker.reply("c1")).code is Code.OK
        await worker.bus.until(replies=2)
        assert {reply.code for reply in worker.replies()} == {Code.OK, Code.INVALID}


async def test_bad_bytes_with_a_known_id_do_not_disturb_its_command(tmp_path: Path) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        worker.send(start(), reply_to="_INBOX.1")
        await machine.at_gate.wait()
        worker.bus.command(CMD, msgpack.packb(envelope(request={"Grow": {}}, reply_to="_INBOX.2")))
        await worker.bus.until(sent=1)
        gate.set()
        reply = await only_reply(worker)
        await worker.bus.until(sent=2)

        assert reply.code is Code.OK
        refusal = codec.decode_reply(worker.bus.sent_to("_INBOX.2")[0])
        assert refusal.code is Code.UNSUPPORTED
        assert len(worker.bus.dead()) == 1


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb(envelope(v=9)),
        msgpack.packb(envelope())[:-1],
        msgpack.packb(envelope()) + b"\xc0",
        msgpack.packb(envelope(issuer=7)),
        msgpack.packb(envelope(deadline_ms=2**63)),
        msgpack.packb(envelope(reply_to=b"_INBOX.1")),
        msgpack.packb(envelope(request={"StartInstance": b""})),
    ],
)  # fmt: skip
async def test_what_is_no_valid_envelope_does_not_take_the_id_in_it_from_its_owner(
    tmp_path: Path, data: bytes
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.bus.command(CMD, data)
        await worker.bus.until(replies=1)
        worker.send(start(), reply_to="_INBOX.2")

        assert (await worker.reply("c1")).code is Code.OK
        assert [run[0] for run in worker.machine.runs] == ["c1"]
        assert len({reply.msg_id for reply in worker.bus.replies()}) == 2


async def test_a_refusal_is_final_for_its_id_and_is_replayed(tmp_path: Path) -> None:
    bad = msgpack.packb(envelope(request={"Grow": {}}))
    async with shell_worker(tmp_path / "j") as worker:
        worker.bus.command(CMD, bad)
        await worker.bus.until(replies=1, sent=1)
        worker.bus.command(CMD, bad)
        await worker.bus.until(sent=2)
        worker.send(start(), reply_to="_INBOX.3")
        await worker.bus.until(sent=3)

        (kept,) = worker.bus.replies()
        assert worker.bus.sent_to("_INBOX.1") == [kept.payload, codec.mark_replayed(kept.payload)]
        assert codec.decode_reply(worker.bus.sent_to("_INBOX.3")[0]).code is Code.CONFLICT
        assert worker.machine.runs == []


async def test_a_refused_message_that_is_redelivered_is_answered_once(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j", consume=False) as worker:
        worker.bus.command(CMD, msgpack.packb(envelope(v=9)))
        worker.bus.up = False
        await worker.intake.receive(worker.bus.delivery(1))
        worker.bus.up = True
        await worker.intake.receive(worker.bus.delivery(1))
        await worker.bus.until(replies=1, sent=1)
        await worker.outbox.drained()

        assert (len(worker.bus.sent), len(worker.bus.dead())) == (1, 1)


async def test_unknown_envelope_keys_are_ignored_and_counted(
    tmp_path: Path,
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.bus.command(CMD, msgpack.packb(envelope(color="red", size=3)))
        reply = await only_reply(worker)

        assert (reply.code, worker.meters.ignored_keys) == (Code.OK, 2)


# -- what nobody foresaw ---------------------------------------------------------------------------


async def test_a_message_that_crashes_intake_is_given_up_at_its_third_delivery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> dict[str, Any]:
        raise OverflowError("Python int too large to convert to SQLite INTEGER")

    async with shell_worker(tmp_path / "j", consume=False) as worker:
        monkeypatch.setattr(worker.intake, "_facts", crash)
        worker.send(Ping(), "p1", reply_to="_INBOX.1")
        for tries in (1, 2):
            await worker.intake.receive(worker.bus.delivery(1))
            assert (tries, list(worker.bus.commands)) == (tries, [1])
        await worker.intake.receive(worker.bus.delivery(1))
        reply = await only_reply(worker)
        await worker.outbox.drained()

        assert (reply.code, reply.detail["act"]) == (Code.INTERNAL, "operator")
        assert len(worker.bus.dead()) == 1


@pytest.mark.parametrize("value", [2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("name", ["issued_at_ms", "deadline_ms", "color"])
async def test_a_number_that_no_integer_of_sqlite_holds_is_answered_and_acknowledged(
    tmp_path: Path, name: str, value: int
) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.bus.command(CMD, msgpack.packb(envelope(**{name: value})))
        reply = await only_reply(worker)

        assert reply.code is (Code.OK if name == "color" else Code.INVALID)


# -- Ping ------------------------------------------------------------------------------------------


def ping(worker: ShellWorker, command_id: str, request: Request = Ping(), **more: Any) -> None:  # noqa: B008 (frozen)
    worker.send(request, command_id, **more)


async def test_ping_is_answered_while_all_lanes_are_busy_and_not_journalled(tmp_path: Path) -> None:
    gate = asyncio.Event()
    machine = FakeHandlers(gate=gate)
    async with shell_worker(tmp_path / "j", machine=machine) as worker:
        for n in range(20):
            worker.send(start(f"a{n}"), f"c{n}")
        await worker.bus.until_acked()
        ping(worker, "p1", reply_to="_INBOX.1")
        reply = await worker.reply("p1")

        assert (reply.code, reply.response) == (Code.OK, Pong())
        assert set(reply.detail) == {
            "version", "protocol", "uptime_s", "boot_id", "host_state", "capacity",
        }  # fmt: skip
        assert reply.detail["protocol"] == {"min": 1, "max": 2}
        assert worker.bus.sent_to("_INBOX.1") == [worker.bus.replies()[0].payload]
        assert await worker.journal.commands.result("p1") is None
        gate.set()
        await worker.lanes.idle()


async def test_a_ping_past_its_deadline_is_expired(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        ping(worker, "p1", deadline_ms=1)

        assert (await worker.reply("p1")).code is Code.EXPIRED


async def test_a_ping_with_the_id_of_a_command_is_a_conflict(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j") as worker:
        worker.send(start())
        await worker.bus.until(replies=1)
        ping(worker, "c1", reply_to="_INBOX.1")
        await worker.bus.until(sent=1)

        assert codec.decode_reply(worker.bus.sent_to("_INBOX.1")[0]).code is Code.CONFLICT
        assert len(worker.bus.replies()) == 1


async def test_a_ping_that_cannot_be_answered_stays_in_the_stream(tmp_path: Path) -> None:
    async with shell_worker(tmp_path / "j", consume=False) as worker:
        ping(worker, "p1")
        worker.bus.up = False
        await worker.intake.receive(worker.bus.delivery(1))

        assert list(worker.bus.commands) == [1]


def test_the_lane_of_the_tests_is_that_of_their_instance() -> None:
    assert SUBJECTS.command(Lane.instance(REF)) == CMD
