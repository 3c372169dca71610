"""`hostd decode` and `hostd encode`, as the author of an agentd uses them."""

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
from click.testing import CliRunner, Result
from hypothesis import given

from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Event, Form, Reply
from schemas.requests import Ok
from schemas.unpack import pack
from tests.unit.wire.wire_values import BOUNDED, commands, events, replies
from worker.cli.codec import decode, encode

VECTORS = json.loads((Path(__file__).parents[2] / "golden" / "rmp-vectors.json").read_text())
REQUESTS = [each for each in VECTORS["vectors"] if "request" in each]
HEAD = b"\x83\xa1v\x01\xa2id\xa3c-1\xa7request"
PING = HEAD + b"\xa4Ping"
SUBJECT = "hostd.v1.default.h1.cmd."


def run(command: Any, *args: str, data: bytes = b"") -> Result:
    env = {"HOSTD_HOST_ID": "h1", "HOSTD_CONFIG": None}
    return CliRunner().invoke(command, list(args), input=data, env=env, catch_exceptions=False)


def error_of(result: Result) -> dict[str, str]:
    error: dict[str, str] = json.loads(result.stdout)["error"]
    assert set(error) == {"code", "path", "message"}
    return error


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("vector", REQUESTS, ids=lambda v: str(v["request"])[:40])
def test_decode_prints_what_serde_json_writes_and_encode_undoes_it(
    vector: dict[str, Any], form: Form
) -> None:
    data = HEAD + bytes.fromhex(vector[f"{form}_hex"])

    decoded = run(decode, data=data)
    encoded = run(encode, "--form", form.value, data=decoded.stdout_bytes)

    assert decoded.exit_code == 0
    request = json.dumps(vector["request"], separators=(",", ":"))
    assert decoded.stdout == f'{{"v":1,"id":"c-1","request":{request}}}\n'
    assert encoded.exit_code == 0
    assert encoded.stdout_bytes == data


def test_a_file_is_read_as_stdin_is(tmp_path: Path) -> None:
    file = tmp_path / "message"
    file.write_bytes(PING)

    assert run(decode, str(file)).stdout == run(decode, "-", data=PING).stdout
    assert run(decode, str(tmp_path / "missing")).exit_code == 2


@pytest.mark.parametrize(
    ("data", "code", "path", "exit_code"),
    [
        (b"", "invalid", "$", 10),
        (PING + b"\x00", "invalid", "$", 10),
        (b"\x80" * 2**20, "invalid", "$", 10),
        (b"\xa4Ping", "invalid", "$", 10),
        (b"\x80", "invalid", "$.v", 10),
        (HEAD + b"\xa6Reboot", "unsupported", "$.request", 11),
        (HEAD + b"\x81\xacStopInstance\x91\xa1a", "invalid", "$.request.StopInstance.pool_id", 10),
        (msgpack.packb({"v": 1, "id": "c", "response": "Ok"}), "invalid", "$.host_id", 10),
        (msgpack.packb({"v": 1, "id": "c", "kind": "status"}), "invalid", "$.host_id", 10),
    ],
    ids=lambda value: ascii(value)[:24],
)  # fmt: skip
def test_an_error_is_json_and_exits_with_its_exit_code(
    data: bytes, code: str, path: str, exit_code: int
) -> None:
    result = run(decode, data=data)

    assert result.exit_code == exit_code
    assert (error_of(result)["code"], error_of(result)["path"]) == (code, path)


@pytest.mark.parametrize(
    ("subject", "path"),
    [
        (SUBJECT + "host", None),
        ("hostd.v1.cmd.h1.cmd.host", None),
        ("a.b.c.d.cmd.host", None),
        (SUBJECT + "network.acme", "$.request.Ping"),
        (SUBJECT + "instance.acme.web.i-1", "$.request.Ping"),
        (SUBJECT + "instance.acme.web", "subject"),
        (SUBJECT + "network.ACME", "subject"),
        ("hostd.v1.default.h1.reply.host", "subject"),
        ("hostd.v1.default.h1", "subject"),
        ("cmd.host", "subject"),
        ("", "subject"),
    ],
)
def test_with_a_subject_the_lane_is_checked(subject: str, path: str | None) -> None:
    result = run(decode, "--subject", subject, data=PING)

    assert result.exit_code == (0 if path is None else 10)
    assert path is None or error_of(result)["path"] == path


def test_an_id_may_equal_a_token_of_the_subject() -> None:
    data = HEAD + msgpack.packb({"StopInstance": ["cmd", "host", "cmd"]})

    assert run(decode, "--subject", SUBJECT + "instance.cmd.host.cmd", data=data).exit_code == 0


def test_each_line_is_answered_and_the_first_refusal_is_the_exit_code() -> None:
    stop = HEAD + msgpack.packb({"StopInstance": ["a", "b", "c"]})
    lines = [PING.hex(), "zz", "", (HEAD + b"\xa1X").hex(), stop.hex().upper()]

    result = run(decode, "--lines", data="\r\n".join(lines).encode() + b"\n")

    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 10
    assert [each.get("error", {}).get("code") for each in answers] == [
        None,
        "invalid",
        "invalid",
        "unsupported",
        None,
    ]


def test_lines_of_encode_are_those_of_decode() -> None:
    lines = b"".join(
        (HEAD + bytes.fromhex(each["compact_hex"])).hex().encode() + b"\n" for each in REQUESTS
    )

    decoded = run(decode, "--lines", data=lines)
    encoded = run(encode, "--lines", "--form", "compact", data=decoded.stdout_bytes)

    assert (decoded.exit_code, encoded.exit_code) == (0, 0)
    assert encoded.stdout_bytes == lines


@pytest.mark.parametrize(
    ("text", "code", "path"),
    [
        ("", "invalid", "$"),
        ('"Ping"', "invalid", "$"),
        ('{"v":1,"id":"a","request":"Ping"} x', "invalid", "$"),
        ('{"v":1,"id":"a","id":"a","request":"Ping"}', "invalid", "$.id"),
        ('{"v":1,"id":"a","request":"Ping","deadline_ms":NaN}', "invalid", "$.deadline_ms"),
        ('{"v":1,"id":"a","request":"Ping","deadline_ms":1.0}', "invalid", "$.deadline_ms"),
        (
            '{"v":1,"id":"a","request":"Ping","deadline_ms":18446744073709551616}',
            "invalid",
            "$.deadline_ms",
        ),
        ('{"v":1,"id":"a","request":"Reboot"}', "unsupported", "$.request"),
        ('{"v":1,"id":"a","request":{"Ping":{}}}', "invalid", "$.request.Ping"),
        ('{"v":1,"id":"a","request":"Ping","k":18446744073709551615}', None, None),
        ('{"v":1,"id":"a","request":"Ping","k":18446744073709551616}', "invalid", "$.k"),
        ('{"v":1,"id":"a","request":"Ping","k":[[[[[[[[[]]]]]]]]]}', "invalid", "$.k" + "[0]" * 7),
    ],
)  # fmt: skip
def test_encode_refuses_what_decode_refuses(text: str, code: str | None, path: str | None) -> None:
    result = run(encode, data=text.encode())

    if code is None:
        assert (result.exit_code, result.stdout_bytes) == (
            0,
            pack({"v": 1, "id": "a", "request": "Ping"}),
        )
        return
    assert result.exit_code == {"invalid": 10, "unsupported": 11}[code]
    assert (error_of(result)["code"], error_of(result)["path"]) == (code, path)


def test_ignored_keys_are_reported_on_stderr() -> None:
    result = run(decode, data=msgpack.packb({"v": 1, "id": "a", "request": "Ping", "x\n": 1}))

    assert result.exit_code == 0
    assert "x\\n" in result.stderr
    assert json.loads(result.stdout) == {"v": 1, "id": "a", "request": "Ping"}


def test_a_form_that_does_not_exist_is_a_usage_error() -> None:
    assert run(encode, "--form", "short", data=b"{}").exit_code == 2


@BOUNDED
@given(commands(taken=True))
def test_any_command_comes_back(command: Command) -> None:
    data = codec.encode_command(command)

    decoded = run(decode, data=data)

    assert run(encode, "--form", command.form.value, data=decoded.stdout_bytes).stdout_bytes == data


@BOUNDED
@given(replies)
def test_any_reply_comes_back(reply: Reply) -> None:
    data = codec.encode_reply(reply, Form.COMPACT)

    decoded = run(decode, data=data)

    assert run(encode, "--form", "compact", data=decoded.stdout_bytes).stdout_bytes == data


@BOUNDED
@given(events)
def test_any_event_comes_back(event: Event) -> None:
    data = codec.encode_event(event)

    decoded = run(decode, data=data)

    assert json.loads(decoded.stdout).get("from") == event.from_
    assert run(encode, data=decoded.stdout_bytes).stdout_bytes == data


def test_encode_with_json_prints_the_bytes_as_hex() -> None:
    envelope = b'{"v": 1, "id": "c-1", "request": "Ping"}'

    result = run(encode, "--json", data=envelope)

    assert json.loads(result.stdout) == {"hex": PING.hex()}


def test_encode_says_where_json_is_invalid() -> None:
    result = run(encode, data=b"{'v': 1}")

    assert json.loads(result.stdout)["error"]["message"] == (
        "invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2"
    )


@pytest.mark.parametrize("fault", ["no machine ID", "stray variable", "unreadable file"])
def test_a_host_without_valid_settings_reads_messages_with_the_defaults(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env: dict[str, str | None] = {"HOSTD_HOST_ID": "h1", "HOSTD_CONFIG": None}
    if fault == "no machine ID":
        env["HOSTD_HOST_ID"] = None
        monkeypatch.setattr("worker.settings.MACHINE_ID_FILE", str(tmp_path / "missing"))
    elif fault == "stray variable":
        env["HOSTD_STRAY"] = "1"
    else:
        monkeypatch.setattr("worker.cli.context.DEFAULT_FILE", str(tmp_path))  # a directory

    decoded = CliRunner().invoke(decode, input=PING, env=env)
    encoded = CliRunner().invoke(encode, input=decoded.stdout, env=env)

    assert (decoded.exit_code, encoded.exit_code, encoded.stdout_bytes) == (0, 0, PING)
    assert decoded.stderr.startswith("default settings are used: ")
    refused = CliRunner().invoke(decode, input=b"", env=env)
    assert (refused.exit_code, error_of(refused)["code"]) == (10, "invalid")


@pytest.mark.parametrize("named", ["option", "variable"])
def test_settings_that_were_asked_for_must_be_valid(named: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    args = ["--config", missing] if named == "option" else []
    env = {"HOSTD_HOST_ID": "h1", "HOSTD_CONFIG": None if args else missing}

    result = CliRunner().invoke(decode, args, input=PING, env=env)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot read the settings file" in result.stderr


def test_a_reply_is_read_without_settings(tmp_path: Path) -> None:
    reply = Reply(
        id="c-1", host_id="h1", response=Ok(), code=Code.OK, received_at_ms=1, finished_at_ms=2
    )
    data = codec.encode_reply(reply, Form.NAMED)

    result = run(decode, "--config", str(tmp_path / "missing"), data=data)

    assert (result.exit_code, result.stderr) == (0, "")
