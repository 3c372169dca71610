"""The Linux guest on real Firecracker without a jail: properties that hostd's tests rely on."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guests import agent
from tests.guests.linux.build import INITRD, ROOTFS, VMLINUX
from tests.guests.namespace import BOOT_ARGS, TAP, TestNamespace
from tests.guests.plain_vm import PlainVm

Boot = Callable[..., PlainVm]


@pytest.fixture(scope="module")
def namespace() -> Iterator[TestNamespace]:
    with TestNamespace(f"hostd-linux-{os.getpid()}") as made:
        yield made


def make_drive(path: Path, label: str, files: dict[str, str] | None = None) -> Path:
    """A 2 MiB ext4 image with these files in it."""
    content = path.with_name(f"{path.name}.content")
    content.mkdir()
    for name, text in (files or {}).items():
        (content / name).write_text(text)
    path.unlink(missing_ok=True)
    options = ["-q", "-F", "-L", label, "-O", "^has_journal", "-d", str(content)]
    subprocess.run(["mkfs.ext4", *options, str(path), "2M"], check=True, capture_output=True)
    return path


@pytest.fixture
def boot(tmp_path: Path, namespace: TestNamespace) -> Iterator[Boot]:
    """Boot a Linux guest with the four drives, each made on first use; killed after the test."""
    with contextlib.ExitStack() as stack:
        drives = [
            (ROOTFS, True),
            (make_drive(tmp_path / "config", "mvm-config", {"config.json": CONFIG}), True),
            (make_drive(tmp_path / "data", "mvm-data"), False),
            (make_drive(tmp_path / "secrets", "mvm-secrets", {"secrets.json": "one"}), True),
        ]

        def start(name: str = "vm") -> PlainVm:
            vm = stack.enter_context(PlainVm(tmp_path / name, netns=namespace.name))
            settings: dict[str, Any] = {"initrd": INITRD, "drives": drives, "tap": TAP}
            vm.boot(VMLINUX, boot_args=BOOT_ARGS, mem_mib=128, **settings)
            vm.ask("Ping", within_s=60)
            return vm

        yield start


CONFIG = json.dumps({"instance_id": "i1", "text": 'tab\t, quote", umlaut ü'}, ensure_ascii=False)


def stat(vm: PlainVm) -> dict[str, Any]:
    answer: dict[str, Any] = vm.ask("Stat")["Stat"]
    return answer


def ask_once(vm: PlainVm, request: Any) -> Any:
    """Send a request once, without the retries of `PlainVm.ask`: the guest counts it."""
    return agent.ask(vm.vsock, request, timeout_s=10)


def read_file(vm: PlainVm, path: str) -> str:
    content: str = vm.ask({"ReadFile": {"path": path}})["ReadFile"]["content"]
    return content.encode("latin-1").decode()


def test_it_boots_with_hostds_arguments_alone_and_finds_its_drives(
    boot: Boot, namespace: TestNamespace
) -> None:
    vm = boot()
    facts = stat(vm)

    assert facts["mounted"] == ["config", "secrets", "data"]
    assert facts["boots"] == 1
    assert read_file(vm, "/mnt/config/config.json") == CONFIG
    assert [drive["label"] for drive in vm.ask("Drives")["Drives"]] == [
        "linux-root",
        "mvm-config",
        "mvm-data",
        "mvm-secrets",
    ]
    assert "Error" in vm.ask({"ReadFile": {"path": "/nowhere"}})
    assert "Error" in vm.ask({"Nonsense": {}})
    assert namespace.ping()
    assert namespace.udp_echo(b"datagram") == b"datagram"
    sent = os.urandom(20_000)
    with namespace.tcp_connect() as stream:
        stream.sendall(sent)
        stream.shutdown(socket.SHUT_WR)
        assert b"".join(iter(lambda: stream.recv(65536), b"")) == sent


def test_it_sleeps_and_wakes_with_new_small_drives_and_a_right_clock(
    boot: Boot, namespace: TestNamespace, tmp_path: Path
) -> None:
    vm = boot()
    before = stat(vm)

    prepared = ask_once(vm, {"SleepPrep": {"drain_timeout_secs": 5}})
    assert prepared == {"SleepPrepAck": {"success": True, "detail": None}}
    assert stat(vm)["mounted"] == ["data"]
    vm.snapshot(tmp_path / "state", tmp_path / "mem")
    vm.kill()
    (tmp_path / "secrets.content" / "secrets.json").unlink()
    (tmp_path / "secrets.content").rmdir()
    make_drive(tmp_path / "secrets", "mvm-secrets", {"secrets.json": "two"})
    with PlainVm(tmp_path / "after", netns=namespace.name) as woken:
        woken.load(tmp_path / "state", tmp_path / "mem")
        woken.ask("Ping")  # the load may cut the connection of the first question
        assert ask_once(woken, "Wake") == {"WakeAck": {"success": True}}
        set_to = time.time_ns()
        set_clock = {"SetClock": {"unix_nanos": set_to}}
        assert abs(ask_once(woken, set_clock)["ClockAck"]["was_off_nanos"]) < 60e9
        on_the_way, asked = time.time_ns() - set_to, time.time_ns()
        after = stat(woken)

        assert after["unix_nanos"] > asked - on_the_way - 0.5e9
        assert after["unix_nanos"] < time.time_ns() + 0.5e9
        assert after["counter"] >= before["counter"]
        assert after["boot_id"] == before["boot_id"]
        assert (after["boots"], after["drains"], after["wakes"]) == (1, 1, 1)
        assert after["mounted"] == ["config", "secrets", "data"]
        assert read_file(woken, "/mnt/secrets/secrets.json") == "two"
        assert namespace.ping()


def test_ctrl_alt_del_ends_it_in_order_and_the_next_boot_is_counted(
    boot: Boot, tmp_path: Path
) -> None:
    first = boot()
    boot_id = stat(first)["boot_id"]

    first.send_ctrl_alt_del()

    assert first.wait(20) == 0
    subprocess.run(["e2fsck", "-fn", tmp_path / "data"], check=True, capture_output=True)
    second = stat(boot("again"))
    assert second["boots"] == 2
    assert second["boot_id"] != boot_id
