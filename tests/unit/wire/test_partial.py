"""One door for a command message: decoded, or the error with what an answer needs."""

import msgpack
import pytest

from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Form
from schemas.partial import Undecodable, decode, peek
from schemas.requests import StartInstance

NOTHING = (None, None)
NO_FIELDS: dict[str, object] = {}
FIELDS = ["acme", "web", "i-1"]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (msgpack.packb({"id": "a", "reply_to": "_INBOX.x"}), ("a", "_INBOX.x")),
        (msgpack.packb({"reply_to": "x", "request": [NO_FIELDS] * 5, "id": "a"}), ("a", "x")),
        (msgpack.packb({"v": 9, "id": "a", "request": 7})[:-1], ("a", None)),
        (b"\x83\xa2id\xa1a\xa1k\xc1\xa8reply_to\xa1x", ("a", None)),
        (b"\x83\xa1k\xa1\xff\xa2id\xa1a\xa1\xff\x01", ("a", None)),
        (b"\x82\xa1k\xdc\xea\x60" + b"\x80" * 60_000 + b"\xa2id\xa1a", ("a", None)),
        (b"\x83\xa2id\xa1a\xa1k\xdd\x00\x01\x86\xa0" + b"\x80" * 100_000, ("a", None)),
        (b"\x82\xa2id\xa1a\xa2id\xa1b", NOTHING),
        (msgpack.packb({"id": "a b", "reply_to": "x y"}), NOTHING),
        (msgpack.packb({"id": "a\n", "reply_to": "x\r\nPUB"}), NOTHING),
        (msgpack.packb({"id": 1, "reply_to": ["x"]}), NOTHING),
        (msgpack.packb({"id": b"a", "reply_to": "x"}), (None, "x")),
        (msgpack.packb(["id", "a"]), NOTHING),
        (b"\xdf\xff\xff\xff\xff\xa2id\xa1a", ("a", None)),
        (b"\x91" * 60_000, NOTHING),
        (b"", NOTHING),
        (b"\xc1", NOTHING),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_id_and_reply_to_are_read_from_a_bad_message(
    data: bytes, found: tuple[str | None, str | None]
) -> None:
    assert peek(data)[:2] == found


@pytest.mark.parametrize(
    ("request_", "form"),
    [
        ({"StartInstance": FIELDS}, Form.COMPACT),
        ({"Unknown": ["x"] * 20}, Form.COMPACT),
        ({"Unknown": [0] * 20_000}, Form.COMPACT),
        ({"Unknown": [0] * 66_000}, Form.COMPACT),
        ({"StartInstance": []}, Form.COMPACT),
        ({"StartInstance": dict(zip("abc", FIELDS, strict=True))}, Form.NAMED),
        ({"SetupNetwork": {"net": FIELDS}}, Form.NAMED),
        ({"A": FIELDS, "B": FIELDS}, Form.NAMED),
        ({"x" * 500: FIELDS}, Form.NAMED),
        ("Ping", Form.NAMED),
        (FIELDS, Form.NAMED),
        (None, Form.NAMED),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_the_form_of_the_answer_is_read_from_a_refused_request(
    request_: object, form: Form
) -> None:
    data = msgpack.packb({"v": 1, "request": request_, "id": "a"})

    assert peek(data).form == form


def test_a_valid_message_is_decoded() -> None:
    command = Command(id="c1", request=StartInstance("acme", "web", "i-1"), reply_to="_INBOX.x")

    assert decode(codec.encode_command(command)) == command


def test_an_invalid_message_has_its_error_and_what_an_answer_needs() -> None:
    request = {"Grow": FIELDS}
    data = msgpack.packb({"v": 1, "id": "a", "reply_to": "_INBOX.x", "request": request})

    decoded = decode(data)

    assert isinstance(decoded, Undecodable)
    assert decoded[1:] == ("a", "_INBOX.x", Form.COMPACT, None, True)
    assert (decoded.error.code, decoded.error.path) == (Code.UNSUPPORTED, "$.request.Grow")
