"""docs/rust: the types for an agentd in Rust read what Python wrote, and write what Python reads.

Needs cargo and crates.io (or a cargo that has the crates of docs/rust/Cargo.lock); `make setup`
does not install it, and without it these tests say that nothing was compiled.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Event, EventKind, Form, Reply, StepTaken
from schemas.requests import (
    DestroyInstance,
    Error,
    Ok,
    Ping,
    Pong,
    Request,
    Response,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    WakeInstance,
)
from schemas.serde import RESPONSE
from schemas.unpack import pack, unpack_map
from worker.cli.seed import net_of

ROOT = Path(__file__).parents[2]
CRATE = ROOT / "docs" / "rust"
IDS = ("acme", "web", "i-1")
REQUESTS: tuple[Request, ...] = (
    Ping(),
    StartInstance(*IDS),
    StopInstance(*IDS),
    SleepInstance(*IDS, force=True),
    SleepInstance(*IDS, force=False, drain_timeout_secs=2**40),
    WakeInstance(*IDS),
    DestroyInstance(*IDS, wipe_volumes=True),
    SetupNetwork("acme", net_of(7)),
    TeardownNetwork("acme", net_of(4095)),
)
RESPONSES: tuple[Response, ...] = (Ok(), Pong(), Error("it's ü"))
TRACEPARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"
REPLY = Reply(
    id="c-1", host_id="h1", response=Error("no"), code=Code.CONFLICT, retryable=True, changed=True,
    status="running", attempts=2, replayed=True, received_at_ms=1, finished_at_ms=2**41,
    steps=(StepTaken("tap", 5, "done"),), left_behind=("tap x",), supported=("1", "2"),
    detail={"act": "sender", "n": 2**53, "deep": {"a": [1.5, None, True, "x"]}},
    request_digest=codec.request_digest(StartInstance(*IDS)), traceparent=TRACEPARENT,
    tracestate="a=1",
)  # fmt: skip
EVENT = Event(
    id="h1:j:1", host_id="h1", boot_id="b", journal_id="j", seq=2**40, at_ms=3,
    kind=EventKind.STATUS, tenant_id="acme", from_="stopped", to="running", detail={"n": 1},
    traceparent=TRACEPARENT, tracestate="a=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example program of the crate, compiled with the crates of its lock file."""
    cargo = shutil.which("cargo")
    if cargo is None:
        pytest.skip("cargo is missing, so docs/rust was not compiled: apt-get install cargo")
    target = tmp_path_factory.mktemp("rust")
    done = subprocess.run(
        [cargo, "build", "--locked", "--quiet", "--manifest-path", CRATE / "Cargo.toml"],
        env={**os.environ, "CARGO_TARGET_DIR": str(target), "RUSTFLAGS": "-D warnings"},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target / "debug" / "hostd-wire"


def through_rust(program: Path, lines: list[tuple[str, Form, bytes]]) -> list[tuple[bytes, str]]:
    """What Rust writes of what it reads, and how it prints it."""
    text = "".join(f"{kind} {form} {data.hex()}\n" for kind, form, data in lines)
    done = subprocess.run(
        [program], input=text, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    written = [line.partition(" ") for line in done.stdout.splitlines()]
    return [(bytes.fromhex(data), shown) for data, _, shown in written]


@pytest.mark.parametrize("form", Form)
def test_requests_and_responses_have_the_same_bytes_in_both_languages(
    program: Path, form: Form
) -> None:
    lines = [("request", form, codec.encode_request(each, form)) for each in REQUESTS]
    compact = form is Form.COMPACT
    lines += [("response", form, pack(RESPONSE.write(each, compact=compact))) for each in RESPONSES]

    written = through_rust(program, lines)

    assert [data for data, _ in written] == [data for _, _, data in lines]
    assert [shown.split(" ")[0] for _, shown in written[: len(REQUESTS)]] == [
        each.kind for each in REQUESTS
    ]


def test_the_forms_of_the_golden_vectors_are_read_alike(program: Path) -> None:
    golden = json.loads((ROOT / "tests/golden/rmp-vectors.json").read_text(encoding="utf-8"))
    vectors = [each for each in golden["vectors"] if "request" in each and not _later(each)]
    assert len(vectors) > 5

    for other, form in (("compact_hex", Form.NAMED), ("named_hex", Form.COMPACT)):
        lines = [("request", form, bytes.fromhex(each[other])) for each in vectors]
        wanted = "named_hex" if form is Form.NAMED else "compact_hex"
        written = through_rust(program, lines)
        for (data, _), vector in zip(written, vectors, strict=True):
            assert codec.decode_request(data) == codec.decode_request(bytes.fromhex(vector[wanted]))


def _later(vector: dict[str, Any]) -> bool:
    """Protocol 2: `workspace_id` and `volumes`, which the crate does not send."""
    return any(name in str(vector["request"]) for name in ("workspace_id", "volumes"))


def test_envelopes_come_back_as_they_were(program: Path) -> None:
    commands = [
        Command(id="c-1", request=each, issued_at_ms=1, deadline_ms=2, reply_to="_INBOX.x")
        for each in REQUESTS
    ]
    compact = Command(id="c-2", request=StartInstance(*IDS), form=Form.COMPACT)
    lines = [("command", Form.NAMED, codec.encode_command(each)) for each in (*commands, compact)]
    lines.append(("reply", Form.NAMED, codec.encode_reply(REPLY)))
    lines.append(("event", Form.NAMED, codec.encode_event(EVENT)))

    *sent, (reply, _), (event, _) = through_rust(program, lines)

    decoded = [codec.decode_command(data) for data, _ in sent]
    assert decoded[:-1] == commands
    assert decoded[-1].request == compact.request
    assert codec.decode_reply(reply) == REPLY
    assert codec.decode_event(event) == EVENT


def test_what_a_newer_hostd_adds_is_ignored(program: Path) -> None:
    raw = unpack_map(codec.encode_event(EVENT)) | {"kind": "brand_new", "more": {"x": 1}}

    ((_, shown),) = through_rust(program, [("event", Form.NAMED, pack(raw))])

    assert 'kind: "brand_new"' in shown
