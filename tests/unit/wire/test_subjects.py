"""Subjects, lanes and reply subjects: what they are called, and who may not be let in."""

import pytest

from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.requests import (
    InstanceRef,
    Ping,
    Request,
    SetupNetwork,
    SleepInstance,
    StartInstance,
)
from schemas.subjects import Lane, Subjects, check_reply_to
from tests.constants import NET, REF

OWN = Subjects("hostd.v1.default", "host_A-1", "default")
INBOX = ("_INBOX.",)


def test_names_are_those_of_the_contract() -> None:
    lane = Lane.instance(REF)

    assert OWN.command(lane) == "hostd.v1.default.host_A-1.cmd.instance.acme.web.i-1"
    assert OWN.command(Lane.network("acme")) == "hostd.v1.default.host_A-1.cmd.network.acme"
    assert OWN.command(Lane.host()) == "hostd.v1.default.host_A-1.cmd.host"
    assert OWN.event(lane, "status") == "hostd.v1.default.host_A-1.evt.instance.acme.web.i-1.status"
    assert OWN.reply(lane) == "hostd.v1.default.host_A-1.reply.instance.acme.web.i-1"
    assert OWN.dead(Lane.host()) == "hostd.v1.default.host_A-1.dead.host"
    assert OWN.ask("ping") == "hostd.v1.default.host_A-1.ask.ping"
    assert OWN.state_key(lane) == "host_A-1.instance.acme.web.i-1"
    assert OWN.host_key == "host_A-1.host"
    assert OWN.command_filter == "hostd.v1.default.host_A-1.cmd.>"
    assert OWN.of_all_hosts("cmd") == "hostd.v1.default.*.cmd.>"
    assert OWN.commands_stream == "HOSTD_CMD_default"
    assert OWN.events_stream == "HOSTD_EVT_default"
    assert OWN.replies_stream == "HOSTD_REPLY_default"
    assert OWN.dead_stream == "HOSTD_DEAD_default"
    assert OWN.state_bucket == "HOSTD_STATE_default"
    assert OWN.consumer == "host_A-1"


@pytest.mark.parametrize(
    ("root", "host", "cell"),
    [
        ("hostd.v1.x", "a.b", "x"),
        ("hostd.v1.x", "a*", "x"),
        ("hostd.v1.x", "", "x"),
        ("hostd.v1.x", "h" * 64, "x"),
        ("hostd.v1.x", "h\n", "x"),
        ("hostd..x", "h", "x"),
        ("hostd.>", "h", "x"),
        ("", "h", "x"),
        ("hostd.v1.x", "h", "a.b"),
        ("hostd.v1.x", "h", "a b"),
    ],
)
def test_a_name_that_would_widen_a_subject_is_refused(root: str, host: str, cell: str) -> None:
    with pytest.raises(ValueError, match=r"^invalid (host ID|cell|subject root) "):
        Subjects(root, host, cell)


@pytest.mark.parametrize("lane", [Lane.host(), Lane.network("acme"), Lane.instance(REF)], ids=str)
def test_a_lane_survives_its_subject(lane: Lane) -> None:
    assert Lane.parse(str(lane)) == lane
    assert OWN.parse_command(OWN.command(lane)) == lane


@pytest.mark.parametrize(
    "subject",
    [
        "hostd.v1.default.host_B.cmd.host",
        "hostd.v1.default.host_A-1x.cmd.host",
        "hostd.v1.other.host_A-1.cmd.host",
        "hostd.v1.default.host_A-1.evt.host",
        "hostd.v1.default.host_A-1.cmd",
        "hostd.v1.default.host_A-1.cmd.",
        "hostd.v1.default.host_A-1.cmd.host.x",
        "hostd.v1.default.host_A-1.cmd.network",
        "hostd.v1.default.host_A-1.cmd.network.Acme",
        "hostd.v1.default.host_A-1.cmd.network.acme\n",
        "hostd.v1.default.host_A-1.cmd.network.-acme",
        "hostd.v1.default.host_A-1.cmd.network." + "a" * 64,
        "hostd.v1.default.host_A-1.cmd.instance.acme.web",
        "hostd.v1.default.host_A-1.cmd.instance.acme.web.i-1.more",
        "hostd.v1.default.host_A-1.cmd.instance.acme..i-1",
        "hostd.v1.default.host_A-1.cmd.instance.acme.web./etc",
        "hostd.v1.default.host_A-1.cmd.tenant.acme",
        "",
    ],
)
def test_a_foreign_subject_or_a_bad_lane_is_invalid(subject: str) -> None:
    with pytest.raises(DecodeError) as caught:
        OWN.parse_command(subject)

    assert (caught.value.code, caught.value.path) == (Code.INVALID, "subject")


@pytest.mark.parametrize(
    ("lane", "request_", "path"),
    [
        (Lane.host(), Ping(), None),
        (Lane.network("acme"), SetupNetwork("acme", NET), None),
        (Lane.instance(REF), StartInstance("acme", "web", "i-1"), None),
        (Lane.network("acme"), Ping(), "$.request.Ping"),
        (Lane.host(), SetupNetwork("acme", NET), "$.request.SetupNetwork"),
        (Lane.network("b"), SetupNetwork("acme", NET), "$.request.SetupNetwork.tenant_id"),
        (
            Lane.instance(InstanceRef("acme", "db", "i-2")),
            SleepInstance("acme", "web", "i-1", force=True),
            "$.request.SleepInstance.pool_id",
        ),
    ],
)
def test_the_lane_must_match_the_body(lane: Lane, request_: Request, path: str | None) -> None:
    if path is None:
        lane.check(request_)
        return

    with pytest.raises(DecodeError) as caught:
        lane.check(request_)

    assert (caught.value.code, caught.value.path) == (Code.INVALID, path)


def test_a_reply_to_an_allowed_inbox_is_accepted() -> None:
    check_reply_to("_INBOX.aB3.x-1_$", INBOX)
    check_reply_to("_REPLY.agent.1", ("_INBOX.", "_REPLY.agent."))


@pytest.mark.parametrize(
    "reply_to",
    [
        "",
        "_INBOX",
        "_INBOX.",
        "_INBOX.a.",
        "_INBOX..a",
        "_INBOX.*",
        "_INBOX.a.>",
        "_INBOX.a*b",
        "_INBOX.a b",
        "_INBOX.a\r\nPUB x 0",
        "_INBOX.a\n",
        "_INBOX.\u00e4",
        "x_INBOX.a",
        "hostd.v1.default.host_A-1.cmd.host",
        "$JS.API.STREAM.DELETE.HOSTD_CMD_default",
        "_INBOX." + "a" * 250,
    ],
)
def test_a_reply_to_any_other_subject_is_refused(reply_to: str) -> None:
    with pytest.raises(DecodeError) as caught:
        check_reply_to(reply_to, INBOX)

    assert (caught.value.code, caught.value.path) == (Code.INVALID, "$.reply_to")


def test_without_prefixes_every_reply_to_is_refused() -> None:
    with pytest.raises(DecodeError):
        check_reply_to("_INBOX.a", ())
