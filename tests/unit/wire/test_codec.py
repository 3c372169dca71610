"""One test per rule of the decoder: what is refused, with which code, and where."""

import time
from typing import Any

import msgpack
import msgspec
import pytest

from schemas import codec
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.envelopes import Command, Event, EventKind, Form, Reply, StepTaken
from schemas.partial import peek
from schemas.requests import (
    Error,
    Ok,
    Ping,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TenantNet,
)
from tests.plain import unpacked

IDS = {"tenant_id": "acme", "pool_id": "web", "instance_id": "i-1"}
SLEEP = IDS | {"force": False, "drain_timeout_secs": 30}
NET = {
    "tenant_net_id": 3,
    "ipv4_subnet": "10.240.3.0/24",
    "gateway_ip": "10.240.3.1",
    "bridge_name": "br-tenant-3",
}
VOLUME = {"workspace_id": "w", "name": "n", "mount_path": "/m", "mode": "read_only"}
NO_FIELDS: dict[str, object] = {}
NO_ITEMS: list[object] = []
ENVELOPE: dict[str, Any] = {"v": 1, "id": "c-1", "request": "Ping"}


def refusal(envelope: object) -> tuple[str, str]:
    data = envelope if isinstance(envelope, bytes) else msgpack.packb(envelope)
    with pytest.raises(DecodeError) as caught:
        codec.decode_command(data)
    return caught.value.code.value, caught.value.path


def refusal_of(request: object) -> tuple[str, str]:
    return refusal(ENVELOPE | {"request": request})


# -- what is taken -------------------------------------------------------------------------------


def test_an_envelope_with_every_key_is_decoded() -> None:
    command = codec.decode_command(
        msgpack.packb(
            {
                "traceparent": "00-a-b-01",
                "request": {"SleepInstance": list(SLEEP.values())},
                "issuer": "agentd/7",
                "reply_to": "_INBOX.x",
                "deadline_ms": codec.TIME_MAX_MS,
                "issued_at_ms": 0,
                "id": "A_z-09",
                "v": 1,
                "colour": {"a": [1, 2.5, None]},
            }
        )
    )

    assert command == Command(
        id="A_z-09",
        request=SleepInstance("acme", "web", "i-1", force=False, drain_timeout_secs=30),
        form=Form.COMPACT,
        issued_at_ms=0,
        deadline_ms=codec.TIME_MAX_MS,
        reply_to="_INBOX.x",
        issuer="agentd/7",
        traceparent="00-a-b-01",
        unknown_keys=("colour",),
    )


@pytest.mark.parametrize("ping", ["Ping", {"Ping": None}])
def test_ping_is_a_string_or_a_map_of_nil(ping: object) -> None:
    command = codec.decode_command(msgpack.packb(ENVELOPE | {"request": ping}))

    assert command.request == Ping()
    assert command.form is Form.NAMED


@pytest.mark.parametrize(
    "fields",
    [
        IDS,
        {**dict(reversed(IDS.items()))},
        ["acme", "web", "i-1"],
        ["acme", "web", "i-1", None],
        ["acme", "web", "i-1", None, NO_ITEMS],
        IDS | {"workspace_id": None, "volumes": NO_ITEMS},
    ],
)
def test_protocols_1_and_2_decode_to_the_same_start(fields: object) -> None:
    command = codec.decode_command(msgpack.packb(ENVELOPE | {"request": {"StartInstance": fields}}))

    assert command.request == StartInstance("acme", "web", "i-1")


@pytest.mark.parametrize(
    "fields",
    [
        ["acme", list(NET.values())],
        ["acme", NET],
        {"tenant_id": "acme", "net": list(NET.values())},
        {"net": NET, "tenant_id": "acme"},
    ],
)
def test_forms_mix_and_the_outer_one_is_answered(fields: object) -> None:
    command = codec.decode_command(msgpack.packb(ENVELOPE | {"request": {"SetupNetwork": fields}}))

    assert command.request == SetupNetwork("acme", msgspec.convert(NET, TenantNet))
    assert command.form is (Form.COMPACT if isinstance(fields, list) else Form.NAMED)


def test_a_missing_drain_timeout_is_nil() -> None:
    ids = list(IDS.values())
    for fields in (
        IDS | {"force": True},
        [*ids, True],
        [*ids, True, None],
        [*ids, True, None, "w"],
    ):
        request = codec.decode_request(msgpack.packb({"SleepInstance": fields}))

        assert isinstance(request, SleepInstance)
        assert request.drain_timeout_secs is None


def test_wide_encodings_of_small_values_are_accepted() -> None:
    data = b"\xdf\x00\x00\x00\x03\xa1v\xcf" + b"\x00" * 7 + b"\x01\xd9\x02id\xda\x00\x01a"

    command = codec.decode_command(data + b"\xa7request\xdb\x00\x00\x00\x04Ping")

    assert command == Command(id="a", request=Ping())


def test_a_protocol_2_command_is_encoded_as_protocol_2() -> None:
    named = IDS | {"workspace_id": None, "volumes": NO_ITEMS}
    for fields in (named, ["acme", "web", "i-1", None, NO_ITEMS]):
        data = msgpack.packb(ENVELOPE | {"request": {"StartInstance": fields}})

        assert codec.encode_command(codec.decode_command(data)) == data


# -- what is not understood ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        ("Reboot", "$.request"),
        ("ping", "$.request"),
        ({"Reboot": NO_FIELDS}, "$.request.Reboot"),
        ({"startInstance": IDS}, "$.request.startInstance"),
        ({"a\nb": None}, "$.request['a\\nb']"),
        ({"StartInstance": IDS | {"colour": 1}}, "$.request.StartInstance.colour"),
        ({"StartInstance": IDS | {"": 1}}, "$.request.StartInstance['']"),
        ({"StartInstance": [*IDS.values(), None, NO_ITEMS, 1]}, "$.request.StartInstance[5]"),
        ({"StopInstance": [*IDS.values(), None, 1]}, "$.request.StopInstance[4]"),
        ({"SleepInstance": [*SLEEP.values(), None, 1]}, "$.request.SleepInstance[6]"),
        ({"SetupNetwork": ["acme", NET, 1]}, "$.request.SetupNetwork[2]"),
        ({"SetupNetwork": ["acme", [*NET.values(), 1]]}, "$.request.SetupNetwork.net[4]"),
        ({"SetupNetwork": ["acme", NET | {"mtu": 1}]}, "$.request.SetupNetwork.net.mtu"),
        (
            {"StartInstance": IDS | {"volumes": [VOLUME]}},
            "$.request.StartInstance.volumes",
        ),
        (
            {"StartInstance": [*IDS.values(), "w", [list(VOLUME.values())]]},
            "$.request.StartInstance.volumes",
        ),
    ],
)
def test_fields_of_a_newer_agentd_are_unsupported(request_: object, path: str) -> None:
    assert refusal_of(request_) == ("unsupported", path)


def test_unsupported_names_the_supported_protocols() -> None:
    with pytest.raises(DecodeError, match="protocol 1 to 2"):
        codec.decode_request(msgpack.packb("Reboot"))


# -- the envelope --------------------------------------------------------------------------------


@pytest.mark.parametrize("envelope", [None, 1, True, "Ping", [], [1, "a", "Ping"]])
def test_an_envelope_is_a_map(envelope: object) -> None:
    assert refusal(envelope) == ("invalid", "$")


@pytest.mark.parametrize("key", ["v", "id", "request"])
def test_v_id_and_request_are_required(key: str) -> None:
    rest = {name: value for name, value in ENVELOPE.items() if name != key}

    assert refusal(rest) == ("invalid", f"$.{key}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("v", 0),
        ("v", 2),
        ("v", True),
        ("v", 1.0),
        ("v", "1"),
        ("v", None),
        ("id", ""),
        ("id", "a" * 65),
        ("id", "a.b"),
        ("id", "a\n"),
        ("id", "\u00e9"),
        ("id", 7),
        ("id", None),
        ("id", b"abc"),
        ("issued_at_ms", -1),
        ("issued_at_ms", codec.TIME_MAX_MS + 1),
        ("issued_at_ms", 2**63),
        ("issued_at_ms", 2**64 - 1),
        ("issued_at_ms", 1.5),
        ("issued_at_ms", True),
        ("deadline_ms", "1"),
        ("deadline_ms", -1),
        ("deadline_ms", codec.TIME_MAX_MS + 1),
        ("deadline_ms", 2**63),
        ("deadline_ms", 2**64 - 1),
        ("reply_to", 1),
        ("reply_to", b"_INBOX.x"),
        ("reply_to", "x" * 513),
        ("issuer", ["a"]),
        ("traceparent", 0),
        ("request", None),
        ("request", 7),
        ("request", []),
        ("request", {}),
        ("request", {"Ping": None, "Pong": None}),
        ("request", ["StartInstance", ["acme", "web", "i-1"]]),
    ],
)
def test_an_envelope_key_of_the_wrong_kind_is_invalid(key: str, value: object) -> None:
    assert refusal(ENVELOPE | {key: value}) == ("invalid", f"$.{key}")


# -- the request ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tenant_id", "pool_id", "instance_id"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "-a",
        "a-",
        "A",
        "a_b",
        "a.b",
        "a/b",
        "..",
        "a\n",
        "a\x00",
        "\u0430",
        "a" * 64,
        7,
        None,
        True,
        b"acme",
        ["a"],
    ],
)
def test_an_id_matches_in_full(name: str, value: object) -> None:
    fields = IDS | {name: value}

    assert refusal_of({"StopInstance": fields})[0] == "invalid"
    assert refusal_of({"StopInstance": fields})[1] == f"$.request.StopInstance.{name}"
    if not isinstance(value, bytes):  # found in the array, before its fields have names
        assert refusal_of({"WakeInstance": list(fields.values())})[1] == (
            f"$.request.WakeInstance.{name}"
        )


def test_an_id_may_have_63_characters() -> None:
    long = "a" * 63

    request = codec.decode_request(msgpack.packb({"StopInstance": [long, "0", "a-0"]}))

    assert request == StopInstance(long, "0", "a-0")
    assert refusal_of({"SetupNetwork": ["a" * 64, NET]}) == (
        "invalid",
        "$.request.SetupNetwork.tenant_id",
    )


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        ({"StartInstance": None}, "StartInstance"),
        ({"StartInstance": "acme"}, "StartInstance"),
        ("StartInstance", ""),
        ({"StartInstance": IDS | {"volumes": None}}, "StartInstance.volumes"),
        ({"StartInstance": IDS | {"volumes": [1]}}, "StartInstance.volumes[0]"),
        ({"StartInstance": IDS | {"workspace_id": 1}}, "StartInstance.workspace_id"),
        ({"StartInstance": IDS | {"workspace_id": "w" * 513}}, "StartInstance.workspace_id"),
        ({"StartInstance": ["acme", "web"]}, "StartInstance.instance_id"),
        ({"StartInstance": []}, "StartInstance.tenant_id"),
        ({"SleepInstance": IDS}, "SleepInstance.force"),
        ({"SleepInstance": SLEEP | {"force": 0}}, "SleepInstance.force"),
        ({"SleepInstance": SLEEP | {"force": None}}, "SleepInstance.force"),
        ({"SleepInstance": SLEEP | {"drain_timeout_secs": -1}}, "SleepInstance.drain_timeout_secs"),
        (
            {"SleepInstance": SLEEP | {"drain_timeout_secs": 3.0}},
            "SleepInstance.drain_timeout_secs",
        ),
        (
            {"SleepInstance": SLEEP | {"drain_timeout_secs": "3"}},
            "SleepInstance.drain_timeout_secs",
        ),
        (
            {"SleepInstance": SLEEP | {"drain_timeout_secs": True}},
            "SleepInstance.drain_timeout_secs",
        ),
        ({"DestroyInstance": IDS}, "DestroyInstance.wipe_volumes"),
        ({"DestroyInstance": IDS | {"wipe_volumes": 1}}, "DestroyInstance.wipe_volumes"),
        ({"SetupNetwork": {"tenant_id": "acme"}}, "SetupNetwork.net"),
        ({"SetupNetwork": ["acme", None]}, "SetupNetwork.net"),
        ({"SetupNetwork": ["acme", "net"]}, "SetupNetwork.net"),
        (
            {"SetupNetwork": ["acme", NET | {"tenant_net_id": 4096}]},
            "SetupNetwork.net.tenant_net_id",
        ),
        ({"SetupNetwork": ["acme", NET | {"tenant_net_id": -1}]}, "SetupNetwork.net.tenant_net_id"),
        (
            {"SetupNetwork": ["acme", NET | {"tenant_net_id": "3"}]},
            "SetupNetwork.net.tenant_net_id",
        ),
        (
            {"TeardownNetwork": ["acme", NET | {"gateway_ip": [10, 240, 3, 1]}]},
            "TeardownNetwork.net.gateway_ip",
        ),
        ({"TeardownNetwork": ["acme", list(NET.values())[:3]]}, "TeardownNetwork.net.bridge_name"),
        ({"Ping": []}, "Ping"),
        ({"Ping": {}}, "Ping"),
        ({"Ping": 0}, "Ping"),
    ],
)
def test_a_broken_rule_of_a_request_is_invalid_and_names_the_field(
    request_: object, path: str
) -> None:
    assert refusal_of(request_) == ("invalid", f"$.request.{path}".rstrip("."))


# -- the bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (b"", "$"),
        (b"\xc1", "$"),
        (b"\x81\xa1v", "$"),
        (msgpack.packb(ENVELOPE)[:-1], "$"),
        (msgpack.packb(ENVELOPE) + b"\xc0", "$"),
        (b"\xdf\xff\xff\xff\xff", "$"),
        (b"\xdb\xff\xff\xff\xff", "$"),
        (b"\x81\x01\x01", "$"),
        (b"\x81\xc4\x01v\x01", "$"),
        (b"\x81\xc4\x00\x01", "$"),
        (b"\x81\xa1k\x81\xc4\x01v\x01", "$.k"),
        (b"\x81\xa1\xff\x01", "$"),
        (b"\x82\xa2id\xa1a\xa2id\xa1a", "$.id"),
        (b"\x81\xa1k\x82\xa1a\x01\xa1a\x01", "$.k.a"),
        (b"\x81\xa1k\x91\xc4\x00", "$.k[0]"),
        (b"\x81\xa1k\xc4\x01x", "$.k"),
        (b"\x81\xa1k\xd4\x05x", "$.k"),
        (b"\x81\xa1k\xc7\x00\x05", "$.k"),
        (b"\x81\xa1k\xd6\xff\x00\x00\x00\x00", "$.k"),
        (b"\x81\xa1k\xcb\x7f\xf8" + b"\x00" * 6, "$.k"),
        (b"\x81\xa1k\xcb\x7f\xf0" + b"\x00" * 6, "$.k"),
        (b"\x81\xa1k\xa3\xed\xa0\x80", "$.k"),
        (b"\x81\xa1k\xa1\xff", "$.k"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_bytes_that_no_field_accepts_are_invalid(data: bytes, path: str) -> None:
    assert refusal(data) == ("invalid", path)


def test_a_duplicate_key_is_reported_with_its_path() -> None:
    fields = b"\x84" + b"".join(msgpack.packb(x) for pair in IDS.items() for x in pair)
    request = b"\x81\xacStopInstance" + fields + b"\xa7pool_id\xa3web"

    data = b"\x83\xa1v\x01\xa2id\xa1a\xa7request" + request

    assert refusal(data) == ("invalid", "$.request.StopInstance.pool_id")


def test_nesting_is_limited() -> None:
    def nested(levels: int) -> object:
        return [] if levels == 1 else [nested(levels - 1)]

    codec.decode_command(msgpack.packb(ENVELOPE | {"k": nested(7)}))
    assert refusal(ENVELOPE | {"k": nested(8)}) == ("invalid", "$.k" + "[0]" * 7)
    assert refusal(b"\x91" * 60_000) == ("invalid", "$")


@pytest.mark.parametrize(
    "large",
    [{"k": [0] * 33}, {"k": {str(i): 0 for i in range(33)}}, {str(i): 0 for i in range(33)}],
)
def test_arrays_and_maps_are_limited(large: dict[str, object]) -> None:
    assert refusal(ENVELOPE | large) == ("invalid", "$")


def test_a_message_has_at_most_64_kib() -> None:
    room = 65_536 - len(msgpack.packb(ENVELOPE | {"k": "x" * 60_000})) + 60_000
    at_limit = msgpack.packb(ENVELOPE | {"k": "x" * room})

    assert len(at_limit) == 65_536
    assert codec.decode_command(at_limit).unknown_keys == ("k",)
    assert refusal(ENVELOPE | {"k": "x" * (room + 1)}) == ("invalid", "$")


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\x00\x10\x00\x00" + b"\x80" * 2**20,
        b"\x80" * 60_000,
        b"\xdc\xea\x60" + b"\x80" * 60_000,
        b"\x83\xa1v\x01\xa2id\xa1a\xa7request\xdc\xea\x60" + b"\x80" * 60_000,
        msgpack.packb(ENVELOPE | {"request": [[[NO_FIELDS] * 32] * 32] * 32}),
        msgpack.packb(ENVELOPE | {"request": [[[NO_ITEMS] * 32] * 32] * 32}),
        (b"\xdc\x00\x20" + b"\x00" * 31) * 1000,
        (b"\x81\xa0") * 30_000,
    ],
    ids=["1MiB", "maps", "array", "wrapped", "tree", "arrays", "chain", "deep"],
)
def test_decoding_costs_no_more_than_the_input(bomb: bytes) -> None:
    def cost_s() -> float:
        started = time.thread_time()
        assert refusal(bomb)[0] == "invalid"
        peek(bomb)
        return time.thread_time() - started

    assert min(cost_s() for _ in range(10)) < 0.001


# -- replies and events --------------------------------------------------------------------------

REPLY = Reply(
    id="c-1",
    host_id="h1",
    response=Error("no"),
    code=Code.NOT_FOUND,
    status="stopped",
    received_at_ms=1,
    finished_at_ms=2,
    steps=(StepTaken("taps", 12, "done"),),
    detail={"why": {"a": [1, None]}},
)
EVENT = Event(
    id="h1:j1:7",
    host_id="h1",
    boot_id="b1",
    journal_id="j1",
    seq=7,
    at_ms=3,
    kind=EventKind.STATUS,
    tenant_id="acme",
    from_="starting",
    to="running",
)


def test_a_reply_is_a_map_whose_response_has_the_form_of_the_request() -> None:
    named = unpacked(codec.encode_reply(REPLY))
    compact = unpacked(codec.encode_reply(REPLY, Form.COMPACT))

    assert list(named) == [
        "v", "id", "host_id", "response", "code", "retryable", "changed", "status", "attempts",
        "replayed", "received_at_ms", "finished_at_ms", "steps", "left_behind", "detail",
    ]  # fmt: skip
    assert named["response"] == {"Error": {"message": "no"}}
    assert compact == named | {"response": {"Error": ["no"]}}
    assert named["code"] == "not_found"
    assert named["steps"] == [{"name": "taps", "took_us": 12, "outcome": "done"}]


def test_supported_is_sent_only_with_unsupported() -> None:
    reply = codec.encode_reply(
        Reply(
            id="c",
            host_id="h",
            response=Ok(),
            code=Code.UNSUPPORTED,
            received_at_ms=1,
            finished_at_ms=1,
            supported=("1", "2"),
        )
    )

    assert unpacked(reply)["supported"] == ["1", "2"]


def test_an_event_omits_keys_that_are_not_set() -> None:
    assert unpacked(codec.encode_event(EVENT)) == {
        "v": 1,
        "id": "h1:j1:7",
        "host_id": "h1",
        "boot_id": "b1",
        "journal_id": "j1",
        "seq": 7,
        "at_ms": 3,
        "kind": "status",
        "tenant_id": "acme",
        "from": "starting",
        "to": "running",
        "detail": {},
    }


def test_a_reply_is_encoded_even_with_a_file_name_that_is_not_utf8() -> None:
    name = b"/x/\xff".decode(errors="surrogateescape")

    data = codec.encode_reply(
        Reply(
            id="c",
            host_id="h",
            response=Error(name),
            code=Code.INVALID,
            received_at_ms=1,
            finished_at_ms=1,
        )
    )

    assert codec.decode_reply(data).response == Error("/x/\\udcff")


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("v", 2, "$.v"),
        ("code", "fine", "$.code"),
        ("changed", 1, "$.changed"),
        ("attempts", -1, "$.attempts"),
        ("response", {"Error": {}}, "$.response.Error.message"),
        ("response", "Fine", "$.response"),
        ("steps", [{"name": "x"}], "$.steps[0].took_us"),
        ("detail", [], "$.detail"),
    ],
)
def test_a_bad_reply_names_the_field(key: str, value: object, path: str) -> None:
    raw = unpacked(codec.encode_reply(REPLY)) | {key: value}

    with pytest.raises(DecodeError) as caught:
        codec.decode_reply(msgpack.packb(raw))

    assert caught.value.path == path


@pytest.mark.parametrize(
    ("key", "value"),
    [("v", 2), ("v", True), ("kind", "party"), ("seq", "7"), ("from", 1), ("detail", None)],
)
def test_a_bad_event_names_the_field(key: str, value: object) -> None:
    raw = unpacked(codec.encode_event(EVENT)) | {key: value}

    with pytest.raises(DecodeError) as caught:
        codec.decode_event(msgpack.packb(raw))

    assert caught.value.path == f"$.{key}"


def test_a_message_quotes_hostile_text_truncated_and_escaped() -> None:
    raw = unpacked(codec.encode_event(EVENT)) | {"kind": "\x1b[31m\u202e" * 5000}

    with pytest.raises(DecodeError) as caught:
        codec.decode_event(msgpack.packb(raw))

    assert str(caught.value).isprintable()
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 1100


def test_a_reply_too_long_for_a_message_is_shortened() -> None:
    for long in (
        {"detail": {"log": "x" * 70_000}},
        {"response": Error("\u00e9" * 70_000)},
        {"steps": (StepTaken("taps", 1, "done"),) * 9000},
        {"left_behind": ("tap " + "x" * 300,) * 300},
    ):
        whole = msgspec.structs.replace(REPLY, **long)

        data = codec.encode_reply(whole)

        sent = codec.decode_reply(data)
        assert len(data) <= codec.SENT_MAX_BYTES
        assert (sent.id, sent.code, sent.status) == (whole.id, whole.code, whole.status)
        assert sent.detail["shortened_from_bytes"] > codec.SENT_MAX_BYTES


def test_an_event_too_long_for_a_message_is_shortened() -> None:
    data = codec.encode_event(
        msgspec.structs.replace(EVENT, reason="r" * 5000, detail={"log": "x" * 70_000})
    )

    assert len(data) <= codec.SENT_MAX_BYTES
    assert codec.decode_event(data).detail["shortened_from_bytes"] > 75_000


def test_a_stored_reply_of_any_size_is_replayed() -> None:
    data = msgpack.packb({"replayed": False, "detail": {"x": ["y"] * 50_000}})

    again = codec.mark_replayed(data)

    assert unpacked(again)["replayed"] is True
    assert len(again) == len(data)
