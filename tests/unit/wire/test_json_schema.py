"""The JSON Schemas of the protocol and hostd's own decoder judge alike."""

import copy
import re
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from schemas import codec
from schemas.acceptance import judge
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, EventKind
from schemas.protocol.details import DETAILS
from schemas.protocol.json_schema import documents
from schemas.requests import (
    DestroyInstance,
    Ping,
    Request,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    WakeInstance,
)
from schemas.tenant_net import check_net_of
from schemas.unpack import pack
from tests.constants import NAMES, NET
from tests.protocol.documents import DIRECTORY, generated
from tests.protocol.validators import accepts

REQUESTS: tuple[Request, ...] = (
    StartInstance(*NAMES),
    StartInstance(*NAMES, workspace_id="w-1"),
    StopInstance(*NAMES),
    SleepInstance(*NAMES, force=False, drain_timeout_secs=30),
    WakeInstance(*NAMES),
    DestroyInstance(*NAMES, wipe_volumes=True),
    SetupNetwork("acme", NET),
    TeardownNetwork("acme", NET),
    Ping(),
)
ENVELOPES = [
    codec.write_command(
        Command(
            id="01JD0000000000000000000000",
            request=request,
            issued_at_ms=1_700_000_000_000,
            deadline_ms=1_700_000_060_000,
            reply_to="_INBOX.a.b",
            issuer="agentd",
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ),
        compact=compact,
    )
    for request in REQUESTS
    for compact in (False, True)
]

# What intake refuses and no schema can say; docs/protocol/README.md lists the same.
BEYOND = re.compile(
    r".*(want an IPv4 subnet without host bits"
    r"|want an address in |want a host address of "  # the gateway against the subnet
    r"|bridge_name: got .*, want br-tenant-"  # against the number of the network
    r"|nested too deeply|items, want at most|maps and arrays"
    r")",
    re.DOTALL,
)


def refused_by_intake(envelope: object) -> DecodeError | None:
    """As a worker whose settings allow any inbox and any subnet answers it."""
    content = judge(pack(envelope), ("",)).content
    if isinstance(content, DecodeError):
        return content
    try:
        if isinstance(content.request, SetupNetwork | TeardownNetwork):
            check_net_of(content.request, ("0.0.0.0/0",))
    except DecodeError as error:
        return error
    return None


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 4095, 4096, 2**32, 253_402_300_800_000, 2**63, 2**64 - 1]),
    st.sampled_from([0.0, 1.0, 0.5, -1.5]),
    st.sampled_from(
        [
            *("", "a", "A", "a\n", "-a", "a-", "a" * 63, "a" * 64, "a" * 65, "x" * 512, "x" * 513),
            *("_INBOX.", "_INBOX..a", "_INBOX.*", "_INBOX.>", ".a", "a b", "é", "Ping", "Pong"),
            *("10.240.3.0/24", "10.240.3.0/30", "10.0.0.0/7", "010.1.1.0/24", "10.240.3.1"),
            *("10.240.3.256", "br-tenant-3", "br-tenant-03", "br-tenant-12345", "StartInstance"),
        ]
    ),
    st.text(max_size=8),
    st.integers(-(2**63), 2**64 - 1),
    st.just([]),
    st.just({}),
    st.lists(st.integers(0, 3), max_size=6),
    st.dictionaries(st.sampled_from(["a", "id", "Ping", "tenant_id"]), st.integers(0, 3)),
)


def places(value: object, here: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [here]
    if isinstance(value, dict):
        for key, each in cast("dict[str, object]", value).items():
            found += places(each, (*here, key))
    elif isinstance(value, list):
        for at, each in enumerate(cast("list[object]", value)):
            found += places(each, (*here, at))
    return found


@st.composite
def damaged(draw: st.DrawFn) -> object:
    """A valid envelope with up to three places replaced, deleted or added to."""
    envelope: Any = copy.deepcopy(draw(st.sampled_from(ENVELOPES)))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([each for each in places(envelope) if each]))
        parent = envelope
        for key in way:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "delete", "add"])):
            case "replace":
                parent[last] = draw(ODD)
            case "delete":
                del parent[last]
            case _ if isinstance(last, int):
                parent.append(draw(ODD))
            case _:
                parent[draw(st.sampled_from(["x", "workspace_id", "volumes", "net"]))] = draw(ODD)
        if not envelope:
            break
    return envelope


@pytest.mark.parametrize("name", documents())
def test_each_schema_is_a_schema_of_2020_12(name: str) -> None:
    Draft202012Validator.check_schema(documents()[name])


def test_what_is_committed_is_what_would_be_generated() -> None:
    """`make protocol` writes it."""
    made = generated()
    there = {
        str(path.relative_to(DIRECTORY)): path.read_text(encoding="utf-8")
        for path in DIRECTORY.rglob("*")
        if path.is_file() and str(path.relative_to(DIRECTORY)) != "README.md"
    }

    assert sorted(there) == sorted(made)
    assert [name for name in made if made[name] != there[name]] == []


def test_every_kind_of_event_has_a_detail() -> None:
    assert set(DETAILS) == set(EventKind)


@pytest.mark.parametrize("envelope", ENVELOPES, ids=lambda each: next(iter(each["request"]), ""))
def test_both_take_every_request_in_both_forms(envelope: dict[str, object]) -> None:
    assert refused_by_intake(envelope) is None
    assert accepts("command", envelope)


@given(damaged())
def test_what_the_schema_refuses_intake_refuses(envelope: object) -> None:
    if not accepts("command", envelope):
        assert refused_by_intake(envelope) is not None


@given(damaged())
def test_what_intake_refuses_the_schema_refuses(envelope: object) -> None:
    refused = refused_by_intake(envelope)

    if refused is not None and not BEYOND.fullmatch(str(refused)):
        assert not accepts("command", envelope)


@pytest.mark.parametrize("envelope", ENVELOPES, ids=lambda each: next(iter(each["request"]), ""))
def test_they_agree_on_each_place_with_each_odd_value(envelope: dict[str, object]) -> None:
    odd = [None, True, -1, 2**64 - 1, 1.0, "", "A", "a\n", "x" * 600, [], {}, [1], {"x": 1}]
    for *way, last in (each for each in places(envelope) if each):
        for value in odd:
            changed: Any = copy.deepcopy(envelope)
            parent = changed
            for key in way:
                parent = parent[key]
            parent[last] = value
            refused = refused_by_intake(changed)

            if refused is None or not BEYOND.fullmatch(str(refused)):
                assert accepts("command", changed) == (refused is None), (
                    changed,
                    refused,
                )
