"""The bytes that real rmp-serde writes, both ways: an agentd in Rust and hostd are one wire."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from schemas import codec
from schemas.envelopes import Form
from schemas.serde import REQUEST, RESPONSE
from schemas.unpack import pack, unpack

VECTORS = json.loads((Path(__file__).parents[2] / "golden" / "rmp-vectors.json").read_text())
REQUESTS = [each for each in VECTORS["vectors"] if "request" in each]
RESPONSES = [each for each in VECTORS["vectors"] if "response" in each]


def test_the_vectors_have_every_variant() -> None:
    def names(values: list[Any]) -> set[str]:
        return {each if isinstance(each, str) else next(iter(each)) for each in values}

    assert names([each["request"] for each in REQUESTS]) == {
        "StartInstance", "StopInstance", "SleepInstance", "WakeInstance", "DestroyInstance",
        "SetupNetwork", "TeardownNetwork", "Ping",
    }  # fmt: skip
    assert names([each["response"] for each in RESPONSES]) == {"Ok", "Error", "Pong"}


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("vector", REQUESTS, ids=lambda v: str(v["request"])[:40])
def test_a_request_is_decoded_and_encoded_as_by_rmp_serde(
    vector: dict[str, Any], form: Form
) -> None:
    data = bytes.fromhex(vector[f"{form}_hex"])

    request = codec.decode_request(data)

    assert REQUEST.write(request) == vector["request"]
    assert codec.encode_request(request, form) == data
    assert REQUEST.read(vector["request"], "$").value == request


@pytest.mark.parametrize("vector", REQUESTS, ids=lambda v: str(v["request"])[:40])
def test_the_digest_of_a_request_is_that_of_its_bytes_in_the_named_form_of_rmp_serde(
    vector: dict[str, Any],
) -> None:
    named, compact = (bytes.fromhex(vector[f"{form}_hex"]) for form in Form)

    digests = {codec.request_digest(codec.decode_request(data)) for data in (named, compact)}

    assert digests == {hashlib.sha256(named).hexdigest()[:32]}


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("vector", RESPONSES, ids=lambda v: str(v["response"]))
def test_a_response_is_decoded_and_encoded_as_by_rmp_serde(
    vector: dict[str, Any], form: Form
) -> None:
    data = bytes.fromhex(vector[f"{form}_hex"])

    response = RESPONSE.read(unpack(data), "$").value

    compact = form is Form.COMPACT
    assert RESPONSE.write(response) == vector["response"]
    assert pack(RESPONSE.write(response, compact=compact)) == data
