"""Every value survives the wire in every form; no bytes bring out anything but `DecodeError`."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import codec
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, Event, Form, Reply
from schemas.partial import peek
from schemas.requests import Request
from schemas.serde import read_request
from schemas.unpack import pack, read_json
from tests.plain import unpacked
from tests.unit.wire.wire_values import BOUNDED, commands, events, replies, requests, written

FORMS = st.sampled_from(Form)
VECTORS = json.loads((Path(__file__).parents[2] / "golden" / "rmp-vectors.json").read_text())
DECODERS: list[Callable[[bytes], object]] = [
    codec.decode_command,
    codec.decode_request,
    codec.decode_reply,
    codec.decode_event,
    read_json,
]


@BOUNDED
@given(requests, FORMS)
def test_a_request_survives_both_forms(request: Request, form: Form) -> None:
    assert codec.decode_request(codec.encode_request(request, form)) == request


@BOUNDED
@given(requests)
def test_a_request_has_one_identity_whatever_its_form(request: Request) -> None:
    again = codec.decode_request(codec.encode_request(request, Form.COMPACT))

    assert codec.encode_request(again) == codec.encode_request(request)


@BOUNDED
@given(st.data())
def test_mixed_forms_and_any_order_mean_the_same(data: st.DataObject) -> None:
    request = data.draw(requests)
    raw: Any = data.draw(written(request))

    tag = read_request(unpacked(msgpack.packb(raw)))

    assert tag.value == request
    assert tag.compact == (isinstance(raw, dict) and isinstance(raw[request.kind], list))


@BOUNDED
@given(commands())
def test_a_command_survives_the_wire_and_can_be_peeked_at(command: Command) -> None:
    data = codec.encode_command(command)

    assert codec.decode_command(data) == command
    assert peek(data).id == command.id
    assert peek(data).form == command.form


@BOUNDED
@given(replies, FORMS)
def test_a_reply_survives_both_forms(reply: Reply, form: Form) -> None:
    data = codec.encode_reply(reply, form)

    assert codec.decode_reply(data) == reply


@BOUNDED
@given(replies, FORMS)
def test_a_replayed_reply_differs_in_one_byte_only(reply: Reply, form: Form) -> None:
    data = codec.encode_reply(reply, form)

    again = codec.mark_replayed(data)

    assert codec.decode_reply(again).replayed is True
    assert sum(a != b for a, b in zip(data, again, strict=True)) == (0 if reply.replayed else 1)


@BOUNDED
@given(events)
def test_an_event_survives_the_wire(event: Event) -> None:
    data = codec.encode_event(event)

    assert codec.decode_event(data) == event
    wire = unpacked(data)
    assert "from_" not in wire
    assert event.from_ is None or wire["from"] == event.from_


def refusal(decode: Callable[[bytes], object], data: bytes) -> DecodeError | None:
    """What the decoder says against the bytes, if it does not take them."""
    try:
        decode(data)
    except DecodeError as error:
        return error
    return None


def only_malformed(data: bytes) -> bool:
    """Whether any decoder took it; the codes and paths of those that did not are sound."""
    peek(data)
    refusals = [refusal(decode, data) for decode in DECODERS]
    for error in filter(None, refusals):
        assert error.code in (Code.INVALID, Code.UNSUPPORTED)
        assert error.path.startswith("$")
        assert str(error).isascii()
        assert len(error.message) < 400
    return None in refusals


@BOUNDED
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_decode_errors(data: bytes) -> None:
    only_malformed(data)


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8)),
    st.sampled_from(["StartInstance", "Ping", "SetupNetwork", "id", "v", "request", "net"]),
)
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.dictionaries(st.text(max_size=6), inner, max_size=4),
        st.dictionaries(st.sampled_from(["StartInstance", "Ping", "SleepInstance"]), inner),
        inner.map(lambda request: {"v": 1, "id": "a", "request": request}),
    ),
    max_leaves=20,
)


@BOUNDED
@given(anything)
def test_any_structure_raises_nothing_but_decode_errors(value: object) -> None:
    only_malformed(msgpack.packb(value))


def corpus() -> list[bytes]:
    requests_ = [bytes.fromhex(v[f"{f}_hex"]) for v in VECTORS["vectors"] for f in Form]
    wrapped = [
        b"\x84\xa1v\x01\xa2id\xa3abc\xa8reply_to\xa8_INBOX.x\xa7request" + each
        for each in requests_
    ]
    event = pack({"v": 1, "id": "h:j:1", "host_id": "h", "boot_id": "b", "journal_id": "j"})
    return requests_ + wrapped + [event, pack({"v": 1, "detail": {"a": [1, {"b": None}]}})]


def mutated(source: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(source.choice(seeds))
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(data) + 1)
        match source.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << source.randrange(8)
            case 1:
                data[at:at] = source.randbytes(source.randint(1, 4))
            case 2:
                del data[at : at + source.randint(1, 8)]
            case 3:
                other = source.choice(seeds)
                data[at:] = other[source.randrange(len(other)) :]
            case _:
                data[at : at + 1] = bytes(
                    [source.choice(b"\x80\x90\xa0\xc0\xc1\xc4\xc7\xcb\xdd\xdf")]
                )
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_messages_raise_nothing_but_decode_errors(seed: int) -> None:
    source = random.Random(seed)
    seeds = corpus()

    taken = sum(only_malformed(mutated(source, seeds)) for _ in range(5000))

    assert 0 < taken < 5000
