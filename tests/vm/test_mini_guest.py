"""The mini guest itself, on real Firecracker without a jail: what hostd's tests rely on."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guests import agent
from tests.guests.firecracker import ensure_firecracker
from tests.guests.mini.build import ROOTFS, VMLINUX, ensure_mini_guest
from tests.guests.namespace import BOOT_ARGS, TAP, TestNamespace
from tests.guests.plain_vm import PlainVm

Boot = Callable[..., PlainVm]


@pytest.fixture(scope="module", autouse=True)
def _binaries() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) and not os.environ.get("CI"):
        pytest.skip("no /dev/kvm")
    ensure_firecracker()
    ensure_mini_guest()


@pytest.fixture(scope="module")
def namespace() -> Iterator[TestNamespace]:
    with TestNamespace(f"hostd-mini-{os.getpid()}") as made:
        yield made


@pytest.fixture
def boot(tmp_path: Path, namespace: TestNamespace) -> Iterator[Boot]:
    """Boot a mini guest in a directory of its own; killed after the test."""
    with contextlib.ExitStack() as stack:

        def start(name: str = "vm", extra: str = "", **more: Any) -> PlainVm:
            vm = stack.enter_context(PlainVm(tmp_path / name, netns=namespace.name, serial=True))
            settings: dict[str, Any] = {"tap": TAP, **more}
            vm.boot(VMLINUX, boot_args=f"{BOOT_ARGS} {extra}", **settings)
            return vm

        yield start


def make_drive(path: Path, label: str, size: str = "1M") -> Path:
    options = ["-q", "-F", "-L", label, "-O", "^has_journal"]
    subprocess.run(["mkfs.ext4", *options, str(path), size], check=True, capture_output=True)
    return path


def stat(vm: PlainVm) -> dict[str, Any]:
    answer: dict[str, Any] = vm.ask("Stat")["Stat"]
    return answer


def test_agent_speaks_hostds_protocol(boot: Boot) -> None:
    vm = boot()

    assert vm.ask("Ping") == "Pong"
    assert agent.ask(vm.vsock, {"Ping": None}) == "Pong"
    assert agent.ask(vm.vsock, {"SleepPrep": {"drain_timeout_secs": 5}}) == {
        "SleepPrepAck": {"success": True, "detail": None}
    }
    assert agent.ask(vm.vsock, "Wake") == {"WakeAck": {"success": True}}
    assert agent.ask(vm.vsock, {"SetClock": {"unix_nanos": 1}}) == {
        "ClockAck": {"was_off_nanos": 0}
    }
    assert agent.ask(vm.vsock, {"Nonsense": {}}) == {"Error": {"message": "unknown request"}}
    facts = stat(vm)
    assert (facts["drains"], facts["wakes"], facts["asleep"]) == (1, 1, False)


def test_frames_may_come_in_pieces_and_several_on_one_connection(boot: Boot) -> None:
    vm = boot()
    vm.ask("Ping")

    with agent.connect(vm.vsock) as stream:
        for piece in (b"\0\0", b"\0\6", b'"Pi', b'ng"\0\0\0\6"Ping"\0'):
            stream.sendall(piece)
        assert [agent.receive(stream), agent.receive(stream)] == ["Pong", "Pong"]
        stream.sendall(b'\0\0\6"Ping"')
        assert agent.receive(stream) == "Pong"


def test_a_frame_that_is_too_long_ends_the_connection_and_nothing_else(boot: Boot) -> None:
    vm = boot()
    vm.ask("Ping")

    with agent.connect(vm.vsock) as stream:
        stream.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(OSError, match="closed"):
            agent.receive(stream)
    assert vm.ask("Ping") == "Pong"


def test_another_port_is_refused(boot: Boot) -> None:
    vm = boot()
    vm.ask("Ping")

    with pytest.raises(OSError, match="closed"):
        agent.connect(vm.vsock, port=5253)


def test_answers_on_its_address(boot: Boot, namespace: TestNamespace) -> None:
    vm = boot()
    vm.ask("Ping")

    assert namespace.ping()
    for size in (1, 2, 3, 1400):
        datagram = os.urandom(size)
        assert namespace.udp_echo(datagram) == datagram
    sent = os.urandom(20_000)
    with namespace.tcp_connect() as stream:
        stream.sendall(sent)
        stream.shutdown(socket.SHUT_WR)
        echoed = b"".join(iter(lambda: stream.recv(65536), b""))
    assert echoed == sent


def test_snapshot_and_load_keep_counter_boot_id_and_open_connection(
    boot: Boot, namespace: TestNamespace, tmp_path: Path
) -> None:
    vm = boot("before")
    before = stat(vm)
    stream = namespace.tcp_connect()
    stream.sendall(b"one")
    assert stream.recv(100) == b"one"

    vm.snapshot(tmp_path / "state", tmp_path / "mem")
    vm.kill()
    with PlainVm(tmp_path / "after", netns=namespace.name) as woken, stream:
        woken.load(tmp_path / "state", tmp_path / "mem")
        after = stat(woken)
        stream.sendall(b"two")

        assert stream.recv(100) == b"two"
        assert after["boot_id"] == before["boot_id"]
        assert after["counter"] > before["counter"]
        assert after["resets"] == before["resets"] + 1
        assert namespace.ping()


def test_boots_are_counted_on_the_data_drive_and_leave_its_file_system_whole(
    boot: Boot, tmp_path: Path
) -> None:
    drives = [(ROOTFS, True)]
    drives.append((make_drive(tmp_path / "config", "mvm-config"), True))
    data = make_drive(tmp_path / "data", "mvm-data", "2M")
    drives.append((data, False))
    seen: list[tuple[int, str]] = []

    for number in (1, 2):
        vm = boot(f"vm{number}", drives=drives)
        seen.append((stat(vm)["boots"], stat(vm)["boot_id"]))
        vm.kill()

    assert [boots for boots, _ in seen] == [1, 2]
    assert seen[0][1] != seen[1][1]
    subprocess.run(["e2fsck", "-fn", data], check=True, capture_output=True)


def test_drives_are_listed_by_label_and_size(boot: Boot, tmp_path: Path) -> None:
    blank = tmp_path / "blank"
    blank.write_bytes(bytes(4096))
    secrets = make_drive(tmp_path / "secrets", "mvm-secrets", "2M")

    vm = boot(drives=[(ROOTFS, True), (blank, False), (secrets, True)])

    assert vm.ask("Drives") == {
        "Drives": [
            {"label": "mini-root", "size_bytes": 1 << 20},
            {"label": "", "size_bytes": 4096},
            {"label": "mvm-secrets", "size_bytes": 2 << 20},
        ]
    }


def test_ctrl_alt_del_ends_it_unless_switched_off(boot: Boot) -> None:
    vm = boot()
    vm.ask("Ping")
    stubborn = boot("stubborn", "mini.cad=off", tap=None)
    stubborn.ask("Ping")

    vm.send_ctrl_alt_del()
    stubborn.send_ctrl_alt_del()

    assert vm.wait() == 0
    assert stubborn.ask("Ping") == "Pong"


@pytest.mark.parametrize("request_", ["Crash", "Reset"])
def test_crash_and_reset_end_the_vmm(boot: Boot, request_: str) -> None:
    vm = boot()
    vm.ask("Ping")

    with contextlib.suppress(OSError):
        agent.ask(vm.vsock, request_)

    assert vm.wait() == 0


def test_hang_leaves_the_vmm_running_without_an_answer(boot: Boot) -> None:
    vm = boot()
    vm.ask("Ping")

    with pytest.raises(OSError, match="timed out"):
        agent.ask(vm.vsock, "Hang", timeout_s=0.3)
    with pytest.raises(OSError, match="timed out"):
        agent.connect(vm.vsock, timeout_s=0.3)
    assert vm.call("GET", "/")["state"] == "Running"


def test_it_misbehaves_on_request(boot: Boot) -> None:
    sleep = {"SleepPrep": {"drain_timeout_secs": 5}}
    vm = boot(extra="mini.drain=refuse mini.wake=refuse")

    assert vm.ask(sleep)["SleepPrepAck"]["success"] is False
    assert vm.ask("Wake") == {"WakeAck": {"success": False}}

    vm.ask({"Set": {"drain": "slow:200"}})
    started = time.monotonic()
    assert agent.ask(vm.vsock, sleep)["SleepPrepAck"]["success"] is True
    assert time.monotonic() - started > 0.15

    vm.ask({"Set": {"drain": "hold", "wake": "silent"}})
    with agent.connect(vm.vsock) as stream:
        agent.send(stream, sleep)
        stream.settimeout(0.2)
        with pytest.raises(OSError, match="timed out"):
            agent.receive(stream)
        assert agent.ask(vm.vsock, "Release") == "Ok"
        stream.settimeout(2)
        assert agent.receive(stream)["SleepPrepAck"]["success"] is True
    with pytest.raises(OSError, match="timed out"):
        agent.ask(vm.vsock, "Wake", timeout_s=0.2)


def test_without_an_agent_nothing_listens_but_the_network_is_up(
    boot: Boot, namespace: TestNamespace
) -> None:
    vm = boot(extra="mini.agent=off")
    deadline = time.monotonic() + 10
    while not namespace.ping():
        assert time.monotonic() < deadline

    with pytest.raises(OSError, match="closed"):
        agent.connect(vm.vsock)


def test_it_idles_cheaply_and_yet_answers_at_once(boot: Boot) -> None:
    vm = boot()
    vm.ask("Ping")

    with agent.connect(vm.vsock) as stream:
        for _ in range(100):  # each within the timeout of the stream
            agent.send(stream, "Ping")
            assert agent.receive(stream) == "Pong"
    busy = cpu_seconds(vm.process.pid)
    with pytest.raises(subprocess.TimeoutExpired):  # a second in which nobody asks
        vm.wait(1.0)
    idle_share = cpu_seconds(vm.process.pid) - busy

    assert idle_share < 0.15


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
