"""Both forms of an answer say the same, whatever is in it."""

import json

import msgpack
import pytest

from tests.plain import unpacked
from worker.bus.message import Message
from worker.queries.forms import Wire, forms_of, write


def test_json_has_all_digits_of_an_integer_base64_of_bytes_and_escapes_surrogates() -> None:
    answer = {"large": 2**64 - 1, "small": -(2**63), "bytes": b"\x00\xff", "name": "a\udcff/ü"}

    written = write(answer, Wire.JSON)

    assert json.loads(written) == {
        "large": 18446744073709551615,
        "small": -9223372036854775808,
        "bytes": "AP8=",
        "name": "a\\udcff/ü",
    }
    assert b"18446744073709551615" in written
    assert unpacked(write(answer, Wire.MSGPACK))["name"] == "a\\udcff/ü"


@pytest.mark.parametrize(
    "body", [{}, {str(n): n for n in range(20)}, {str(n): n for n in range(70_000)}, [], [1] * 20]
)
def test_no_map_of_msgpack_is_taken_for_json(body: object) -> None:
    message = Message("s", "r", msgpack.packb(body), {})

    assert forms_of(message) == (Wire.MSGPACK, Wire.MSGPACK)


@pytest.mark.parametrize("text", ["{}", "[]", '"a"', "-1", "0", "true", "null", " {}", "\r\n\t{}"])
def test_every_json_text_is_taken_for_json(text: str) -> None:
    assert forms_of(Message("s", "r", text.encode(), {})) == (Wire.JSON, Wire.JSON)
