"""systemd's notification protocol, on a real socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.supervision.service_manager import STATUS_CHARS, ServiceManager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """What systemd binds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        yield listener


def said(manager: socket.socket) -> list[str]:
    lines: list[str] = []
    while True:
        try:
            lines.append(manager.recv(4096).decode())
        except BlockingIOError:
            return lines


def environment(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(manager.getsockname()), "PATH": "/bin", **more}


def test_each_fact_is_a_datagram_and_a_status_is_one_short_line(manager: socket.socket) -> None:
    service = ServiceManager(environment(manager))

    service.ready()
    service.status("two\nlines " + "x" * 500)
    service.alive()
    service.stopping()

    first, status, *rest = said(manager)
    assert [first, *rest] == ["READY=1", "WATCHDOG=1", "STOPPING=1"]
    assert status.startswith("STATUS=two lines xxx")
    assert len(status) == len("STATUS=") + STATUS_CHARS


def test_an_abstract_address_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0hostd-test-{os.getpid()}")

        ServiceManager({"NOTIFY_SOCKET": f"@hostd-test-{os.getpid()}"}).ready()

        assert listener.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "9" * 5000}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_the_one_that_is_meant_for_this_process(
    manager: socket.socket, variables: dict[str, str], watchdog_s: float | None
) -> None:
    assert ServiceManager(environment(manager, **variables)).watchdog_s == watchdog_s


def test_children_inherit_nothing_of_it(manager: socket.socket) -> None:
    variables = environment(manager, WATCHDOG_USEC="60000000", WATCHDOG_PID="7")

    ServiceManager(variables)

    assert variables == {"PATH": "/bin"}


def test_without_a_manager_or_with_one_that_is_gone_nothing_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody, gone = ServiceManager({}), ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")})

    for service in (nobody, gone):
        service.ready()
        service.alive()

    assert (nobody.listens, gone.listens) == (False, True)
    assert capsys.readouterr().out.count("service_manager.unreachable") == 1
