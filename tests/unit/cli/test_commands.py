"""Replies as text, and the checks of arguments before a command is sent."""

from pathlib import Path
from typing import Any

import pytest

from schemas.codes import Code
from schemas.envelopes import Reply
from schemas.requests import (
    Error,
    Ok,
    Ping,
    Pong,
    SetupNetwork,
    StopInstance,
    TeardownNetwork,
)
from tests.unit.cli.hostd import hostd
from worker.cli import provision
from worker.cli.commands import describe_reply
from worker.cli.seed import net_of

STOP = StopInstance("acme", "web", "i-1")


def reply(**facts: Any) -> Reply:
    common: dict[str, Any] = {
        "id": "c-1",
        "host_id": "h1",
        "response": Ok(),
        "code": Code.OK,
        "changed": True,
        "received_at_ms": 1000,
        "finished_at_ms": 1042,
    }
    return Reply(**common | facts)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"status": "stopped"}, "ok: acme/web/i-1 is stopped, 42 ms"),
        ({"changed": False}, "ok: acme/web/i-1 (no change), 42 ms"),
        ({"replayed": True}, "ok: acme/web/i-1 (replayed), 42 ms"),
        ({"detail": {"pid": 7}}, "ok: acme/web/i-1, 42 ms\n  pid: 7"),
        (
            {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"},
            f"ok: acme/web/i-1, 42 ms\ntrace: {'ab' * 16}",
        ),
        ({"left_behind": ("tap tn7i3",)}, "ok: acme/web/i-1, 42 ms\nleft behind: tap tn7i3"),
        (
            {"response": Error("busy"), "code": Code.UNAVAILABLE, "retryable": True},
            "unavailable: acme/web/i-1: busy; retryable with a new command ID",
        ),
        (
            {"response": Error("no"), "code": Code.UNSUPPORTED, "supported": ("1", "2")},
            "unsupported: acme/web/i-1: no\nsupported: 1, 2",
        ),
    ],
)
def test_a_reply_is_printed_with_its_outcome_first(facts: dict[str, Any], text: str) -> None:
    assert describe_reply(STOP, reply(**facts)) == text


@pytest.mark.parametrize(
    ("detail", "text"),
    [
        ({"protocol": {"min": 1, "max": 2}}, "protocol: min 1, max 2"),
        ({"limits_enforced": True}, "limits_enforced: true"),
        ({"taps": ["tn7i3", "tn7i4"], "left": []}, "taps: tn7i3, tn7i4\n  left: none"),
    ],
)
def test_detail_is_text_not_python(detail: dict[str, Any], text: str) -> None:
    assert describe_reply(STOP, reply(detail=detail)).endswith(f"ms\n  {text}")


def test_a_network_is_up_or_down() -> None:
    up, down = SetupNetwork("acme", net_of(7)), TeardownNetwork("acme", net_of(7))

    assert describe_reply(up, reply()) == "ok: network of acme is up, 42 ms"
    assert describe_reply(down, reply()) == "ok: network of acme is down, 42 ms"


@pytest.mark.parametrize(
    "verb", ["start", "stop", "sleep", "wake", "destroy", "show", "usage", "logs"]
)
def test_an_invalid_instance_id_is_refused_before_it_is_sent(verb: str) -> None:
    result = hostd(verb, "acme", "web", "I_1")

    assert result.exit_code == 10
    assert result.stderr.startswith("invalid: instance ID 'I_1': use 1-63 characters")


def test_an_invalid_command_id_is_named_with_its_option() -> None:
    result = hostd("ping", "--id", "a b")

    assert result.exit_code == 10
    assert result.stderr.startswith("invalid: --id 'a b': use 1 to 64 characters")


def test_a_ping_is_not_reported_as_unchanged() -> None:
    assert describe_reply(Ping(), reply(response=Pong(), changed=False)) == "ok: host, 42 ms"


def test_an_invalid_tenant_id_is_refused_before_it_becomes_a_path() -> None:
    result = hostd("net-up", "../A")

    assert result.exit_code == 10
    assert result.stderr == (
        "invalid: tenant ID '../A': use 1-63 characters a-z, 0-9 or '-', "
        "starting and ending with a letter or digit\n"
    )


def test_a_missing_tenant_file_is_not_found_and_named(tmp_path: Path) -> None:
    result = hostd("net-up", "acme", HOSTD_PATHS_DATA=str(tmp_path))

    assert result.exit_code == 13
    assert f"{tmp_path}/tenants/acme/tenant.json: no such file" in result.stderr


@pytest.mark.parametrize("text", ["", "x", f"00-{'0' * 32}-{'cd' * 8}-01"])
def test_an_invalid_traceparent_is_refused_before_anything_is_sent(text: str) -> None:
    result = hostd("start", "acme", "web", "i-1", f"--traceparent={text}")

    assert result.exit_code == 10
    assert "--traceparent" in result.output


@pytest.mark.parametrize("deadline", ["-1", "0", "inf", "nan", "1e306", "31536001"])
def test_a_deadline_that_has_passed_or_never_comes_is_a_usage_error(deadline: str) -> None:
    result = hostd("start", "acme", "web", "i-1", f"--deadline={deadline}")

    assert result.exit_code == 2
    assert "--deadline" in result.stderr


def test_provision_without_a_server_reports_one_sentence_and_no_log_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provision, "CONNECT_TIMEOUT_S", 0.2)

    result = hostd("provision", "--url", "nats://user:secret@127.0.0.1:1")

    assert result.exit_code == 30
    first, second = result.stderr.splitlines()
    assert first.startswith("provisioning cell default at nats://127.0.0.1:1, hosts: h1")
    assert second.startswith("no_answer: cannot connect to NATS at nats://127.0.0.1:1 within 0.2 s")
    assert "secret" not in result.output
