"""What of the NATS edge needs no server: back-off, the library's check, credentials, configs."""

from pathlib import Path

import pytest
from nats import errors
from nats.aio.client import Client

from schemas.settings import NatsSettings
from schemas.subjects import Subjects
from worker.bus import streams
from worker.bus.connection import Link
from worker.bus.credentials import CredentialsFile
from worker.bus.guarded_client import STANDARD, Backoff, LibraryMismatch, check_library
from worker.bus.message import Message
from worker.bus.protocol import Delivery
from worker.bus.pull_consumer import to_delivery

SUBJECTS = Subjects("hostd.v1.test", "h1", "test")


def test_the_installed_nats_py_fits_the_guards() -> None:
    check_library()


def test_a_nats_py_that_lost_a_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Client, "_process_pong")

    with pytest.raises(LibraryMismatch, match="_process_pong"):
        check_library()


def test_a_nats_py_that_changed_a_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def changed(self: Client, line: bytes, more: int) -> None: ...

    monkeypatch.setattr(Client, "_process_err", changed)

    with pytest.raises(LibraryMismatch, match=r"_process_err.*more"):
        check_library()


def test_back_off_has_full_jitter_below_a_growing_bound() -> None:
    rounds: list[list[float]] = []
    for _ in range(200):
        backoff = Backoff(0.25, 1.5)
        rounds.append([backoff.next_s() for _ in range(6)])

    bounds = [0.25, 0.5, 1.0, 1.5, 1.5, 1.5]
    for attempt, bound in enumerate(bounds):
        delays = [one[attempt] for one in rounds]
        assert max(delays) <= bound
        assert min(delays) < bound * 0.1
        assert max(delays) > bound * 0.9


def test_a_stalled_connection_is_found_within_15_s_and_a_reconnect_waits_below_2_s() -> None:
    assert STANDARD.ping_s * (STANDARD.pings + 1) + STANDARD.backoff_cap_s < 15
    assert STANDARD.backoff_cap_s < 2
    assert STANDARD.heartbeat_s * 2.5 < 15


def test_without_jitter_every_host_waits_the_same() -> None:
    assert {Backoff(0.25, 1.5, jitter=False).next_s() for _ in range(20)} == {1.5}


def secret(path: Path, text: str) -> CredentialsFile:
    path.write_text(text)
    path.chmod(0o600)
    return CredentialsFile(str(path))


def test_user_and_password_of_one_attempt_belong_together(tmp_path: Path) -> None:
    creds = secret(tmp_path / "creds", "host:first:with colon\n")

    assert (creds.user(), creds.password()) == ("host", "first:with colon")

    assert creds.user() == "host"
    (tmp_path / "creds").write_text("host:second")
    assert creds.password() == "first:with colon"
    assert (creds.user(), creds.password()) == ("host", "second")


@pytest.mark.parametrize("text", ["", "no colon", "a:b\nc:d", ":x"])
def test_a_credentials_file_that_is_neither_form_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(errors.Error, match="neither NATS credentials nor"):
        secret(tmp_path / "creds", text).user()


def test_credentials_that_others_can_read_are_refused(tmp_path: Path) -> None:
    creds = secret(tmp_path / "creds", "a:b")
    (tmp_path / "creds").chmod(0o640)

    with pytest.raises(errors.Error, match="chmod 600"):
        creds.user()


def test_a_nats_credentials_file_is_known_by_its_head(tmp_path: Path) -> None:
    assert secret(tmp_path / "a", "-----BEGIN NATS USER JWT-----\nx\n").is_jwt()
    assert not secret(tmp_path / "b", "a:b").is_jwt()
    assert not CredentialsFile(str(tmp_path / "missing")).is_jwt()


@pytest.mark.parametrize(
    "reply",
    [
        "$JS.ACK.HOSTD_CMD_test.h1.3.17.40.1700000000000000000.0",
        "$JS.ACK.hub.ACCHASH.HOSTD_CMD_test.h1.3.17.40.1700000000000000000.0",
        "$JS.ACK._.ACCHASH.HOSTD_CMD_test.h1.3.17.40.1700000000000000000.0.random",
    ],
)
def test_both_forms_of_ack_subjects_are_read(reply: str) -> None:
    link = Link(NatsSettings(), name="t", inbox="_INBOX.t")

    got: Delivery = to_delivery(Message("s", reply, b"x", {"nats-msg-id": "id-1"}), link)

    assert (got.delivered, got.stream_seq, got.msg_id) == (3, 17, "id-1")


def test_differences_name_the_field_and_both_values() -> None:
    wanted = {"a": 1, "b": "x", "c": True, "d": 0, "e": False}

    assert streams.differences(wanted, {"a": 2, "b": "x"}) == [
        "a: is 2, must be 1",
        "c: is False, must be True",
    ]


def test_own_subjects_belong_to_their_streams() -> None:
    own = "hostd.v1.test.h1"
    found = [streams.stream_of(SUBJECTS, f"{own}.{kind}.host") for kind in ("evt", "cmd", "x")]

    assert found == ["HOSTD_EVT_test", None, None]
    assert streams.stream_of(SUBJECTS, "_INBOX.evt.x") is None
