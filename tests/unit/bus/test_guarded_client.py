"""The guards of nats-py without a server: the check of the library, backoff, times."""

import pytest
from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from worker.bus.guarded_client import STANDARD, Backoff, LibraryMismatch, check_library


def test_the_installed_nats_py_has_what_the_guards_need() -> None:
    check_library()


def test_a_nats_py_without_a_method_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Client, "_process_pong")

    with pytest.raises(LibraryMismatch, match="_process_pong"):
        check_library()


def test_a_nats_py_with_another_signature_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def changed(self: Client, line: bytes, more: int) -> None: ...

    monkeypatch.setattr(Client, "_process_err", changed)

    with pytest.raises(LibraryMismatch, match=r"_process_err.*more"):
        check_library()


def test_a_nats_py_whose_transport_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: TcpTransport) -> None: ...

    monkeypatch.setattr(TcpTransport, "__init__", changed)

    with pytest.raises(LibraryMismatch, match="_bare_io_writer"):
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


def test_a_stalled_connection_is_detected_within_15_s_and_a_reconnect_waits_below_2_s() -> None:
    assert STANDARD.ping_s * (STANDARD.pings + 1) + STANDARD.backoff_cap_s < 15
    assert STANDARD.backoff_cap_s < 2
    assert STANDARD.heartbeat_s * 2.5 < 15


def test_without_jitter_every_host_waits_the_same() -> None:
    assert {Backoff(0.25, 1.5, jitter=False).next_s() for _ in range(20)} == {1.5}
