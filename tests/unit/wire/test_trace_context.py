"""W3C Trace Context: what is valid, what of it is passed on, and that nothing else is refused."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import codec
from schemas.acceptance import judge
from schemas.envelopes import Command
from schemas.requests import Ping
from schemas.trace_context import MEMBERS_MAX, TraceContext, fields_of, parse

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"
INVALID = [
    None,
    "",
    "x",
    f"00-{TRACE}-{SPAN}",
    f"00-{TRACE}-{SPAN}-1",
    f"00-{TRACE}-{SPAN}-01-",
    f"00-{TRACE}-{SPAN}-01-more",
    f"ff-{TRACE}-{SPAN}-01",
    f"ff-{TRACE}-{SPAN}-01-more",
    f"01-{TRACE}-{SPAN}-01more",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{TRACE[:-1]}g-{SPAN}-01",
    f"00-{TRACE}-{SPAN}-0x",
    f" {VALID}",
    f"{VALID}\n",
    f"0\u0660-{TRACE}-{SPAN}-01",
    f"01-{TRACE}-{SPAN}-01-{'x' * 500}",
]


def test_a_valid_parent_is_read() -> None:
    assert parse(VALID) == TraceContext(TRACE, SPAN, sampled=True)


@pytest.mark.parametrize("text", INVALID, ids=lambda text: ascii(text)[:60])
def test_an_invalid_parent_is_no_context(text: str | None) -> None:
    assert parse(text, "a=1") is None


@pytest.mark.parametrize(
    ("flags", "sent"), [("00", "00"), ("01", "01"), ("02", "00"), ("03", "01"), ("ff", "01")]
)
def test_of_the_flags_only_sampled_is_passed_on(flags: str, sent: str) -> None:
    context = parse(f"00-{TRACE}-{SPAN}-{flags}")

    assert context is not None
    assert context.traceparent == f"00-{TRACE}-{SPAN}-{sent}"


@pytest.mark.parametrize("text", [f"cc-{TRACE}-{SPAN}-01", f"01-{TRACE}-{SPAN}-01-of-the-future"])
def test_a_later_version_is_read_as_the_first(text: str) -> None:
    assert parse(text) == parse(VALID)


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("a=1", "a=1"),
        ("rojo=00f067aa0ba902b7, congo=t61rcWkgMzE", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        ("a=1,,b=2,", "a=1,b=2"),
        ("tenant@vendor=a b", "tenant@vendor=a b"),
        (",".join(f"k{n}=v" for n in range(MEMBERS_MAX)), ...),
        (",".join(f"k{n}=v" for n in range(MEMBERS_MAX + 1)), ""),
        ("a=1,a=2", ""),
        ("A=1", ""),
        ("a", ""),
        ("a=", ""),
        ("a=b=c", ""),
        ("a=ü", ""),
        ("a=1\r\nX: y", ""),
        (f"a={'x' * 510}", ""),
        (None, ""),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_an_invalid_state_is_left_out_and_the_parent_stays(state: str | None, kept: object) -> None:
    context = parse(VALID, state)

    assert context is not None
    assert context.state == (state if kept is ... else kept)
    assert context.traceparent == VALID
    assert fields_of(context).get("tracestate", "") == context.state


@given(st.text(), st.text())
def test_no_text_is_an_error(parent: str, state: str) -> None:
    parse(parent, state)
    parse(VALID, state)


@pytest.mark.parametrize("text", [*INVALID, "x" * 30_000], ids=lambda text: ascii(text)[:60])
def test_a_command_is_taken_whatever_its_context(text: str | None) -> None:
    envelope = {"v": 1, "id": "c1", "request": "Ping", "traceparent": text, "tracestate": text}

    judged = judge(msgpack.packb(envelope), ["_INBOX."])

    assert isinstance(judged.content, Command)
    assert (judged.content.request, judged.trace) == (Ping(), None)


@pytest.mark.parametrize(
    ("parent", "state", "request_", "named"),
    [
        (VALID, "a=1", "Ping", ()),
        (f"cc{VALID[2:]}-", "a=1", "Ping", ()),
        (f"cc{VALID[2:]}-{'x' * 512}", "a=1", "Ping", ("traceparent",)),
        (VALID, f"a={'x' * 250},b={'x' * 250},c=xxxxxxxx", "Ping", ("tracestate",)),
        (None, "A=1", "Ping", ()),
        ("odd", "A=1", "Ping", ("traceparent",)),
        ("odd", "A=1", "Grow", ("traceparent",)),
        (VALID, "A=1", "Grow", ()),
    ],
    ids=["valid", "newer", "long parent", "long state", "alone", "both", "unread both", "unread"],
)
def test_what_is_not_taken_of_a_context_is_named(
    parent: str | None, state: str, request_: str, named: tuple[str, ...]
) -> None:
    envelope = {"v": 1, "id": "c1", "request": request_, "tracestate": state}

    judged = judge(
        msgpack.packb(envelope | ({} if parent is None else {"traceparent": parent})), ["_INBOX."]
    )

    assert judged.trace_ignored == named


def test_the_context_of_a_message_without_a_valid_request_is_read() -> None:
    envelope = {"v": 1, "id": "c1", "request": "Grow", "traceparent": VALID}

    judged = judge(msgpack.packb(envelope), ["_INBOX."])

    assert judged.trace == TraceContext(TRACE, SPAN, sampled=True)


def test_a_command_keeps_both_texts() -> None:
    command = Command(id="c1", request=Ping(), traceparent=VALID, tracestate="a=1")

    assert codec.decode_command(codec.encode_command(command)) == command
