"""The examples of docs/protocol: what hostd's decoders make of each dump is the JSON beside it."""

import json
import re
from typing import Any

import pytest

from schemas import codec
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import EventKind, Form
from schemas.protocol.json_schema import STATES
from schemas.protocol.queries import REQUESTS
from schemas.serde import REQUEST
from tests.plain import unpacked
from tests.protocol.documents import DIRECTORY
from tests.protocol.hexdump import annotated, unhex
from tests.protocol.validators import accepts, faults

PAIR = re.compile(r"```json\n(.*?)\n```\n\n```text\n(.*?)\n```", re.DOTALL)
COMPACT = re.compile(r"compact form[^\n]*\n\n```text\n(.*?)\n```", re.DOTALL)
UNKNOWN = "MoveInstance"


def sections(page: str) -> dict[str, str]:
    """The text of each section of a page, by its heading."""
    text = (DIRECTORY / page).read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def pairs(text: str) -> list[tuple[Any, bytes]]:
    """JSON and bytes of each message in a section."""
    return [(json.loads(shown), unhex(dump)) for shown, dump in PAIR.findall(text)]


COMMANDS = sections("commands.md")
EVENTS = sections("events.md")
QUESTIONS = sections("questions.md")
STATE = sections("state.md")


def test_there_is_an_example_of_everything() -> None:
    assert set(COMMANDS) == {*(kind.__name__ for kind in REQUEST.variants), UNKNOWN}
    assert set(EVENTS) == set(EventKind)
    assert set(QUESTIONS) == set(REQUESTS)
    assert set(STATE) == {*STATES, "dead letter"}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_and_replies_decode_to_the_json_beside_them(name: str) -> None:
    (command, sent), (reply, received) = pairs(COMMANDS[name])

    assert unpacked(sent) == command
    assert unpacked(received) == reply
    assert unpacked(codec.encode_reply(codec.decode_reply(received))) == reply
    assert faults("reply", reply) == []
    if name == UNKNOWN:
        with pytest.raises(DecodeError):
            codec.decode_command(sent)
        assert not accepts("command", command)
        assert reply["code"] == Code.UNSUPPORTED
    else:
        assert codec.write_command(codec.decode_command(sent)) == command
        assert accepts("command", command)
        assert reply["code"] == Code.OK


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in {"Ping", UNKNOWN}])
def test_the_compact_form_is_the_same_request(name: str) -> None:
    (command, sent), _ = pairs(COMMANDS[name])
    (dump,) = COMPACT.findall(COMMANDS[name])

    request = codec.decode_request(unhex(dump))

    assert request == codec.decode_command(sent).request
    assert codec.encode_request(request, Form.COMPACT) == unhex(dump)
    assert accepts("command", {**command, "request": unpacked(unhex(dump))})


@pytest.mark.parametrize("kind", EVENTS)
def test_events_decode_to_the_json_beside_them(kind: str) -> None:
    ((event, data),) = pairs(EVENTS[kind])

    assert codec.write_event(codec.decode_event(data)) == event
    assert event["kind"] == kind
    assert faults("event", event) == []


@pytest.mark.parametrize("verb", QUESTIONS)
def test_questions_and_answers_decode_to_the_json_beside_them(verb: str) -> None:
    (question, asked), (answer, answered) = pairs(QUESTIONS[verb])

    assert (unpacked(asked), unpacked(answered)) == (question, answer)
    assert accepts(f"ask.{verb}.request", question)
    assert faults(f"ask.{verb}.answer", answer) == []


@pytest.mark.parametrize("kind", STATES)
def test_state_decodes_to_the_json_beside_it(kind: str) -> None:
    ((value, data),) = pairs(STATE[kind])

    assert unpacked(data) == value
    assert faults(f"state.{kind}", value) == []


def test_a_dump_is_the_bytes_of_its_value() -> None:
    value = {"a": [1, "x", None], "b": {"c": True, "d": 0.5}}

    assert unpacked(unhex("\n".join(annotated(value)))) == value
