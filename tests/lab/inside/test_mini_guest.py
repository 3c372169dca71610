"""The mini guest on a processor's own virtualization; tests/vm has it on whatever KVM there is."""

import time
from pathlib import Path

from tests.guests.mini.build import ROOTFS, VMLINUX
from tests.guests.namespace import BOOT_ARGS
from tests.guests.plain_vm import PlainVm


def test_mini_guest_boots_sleeps_and_wakes_on_true_kvm(tmp_path: Path) -> None:
    with PlainVm(tmp_path / "before") as vm:
        vm.boot(VMLINUX, boot_args=BOOT_ARGS, drives=[(ROOTFS, True)])
        before = vm.ask("Stat")["Stat"]
        vm.snapshot(tmp_path / "state", tmp_path / "mem")
    with PlainVm(tmp_path / "after") as woken:
        woken.load(tmp_path / "state", tmp_path / "mem")
        after = woken.ask("Stat")["Stat"]
        until = time.monotonic() + 20
        latest = after
        # A guest that is still busy with the last question is not woken by an interrupt.
        while not latest["device_interrupts"] and time.monotonic() < until:
            latest = woken.ask("Stat")["Stat"]

    assert latest["boot_id"] == after["boot_id"] == before["boot_id"]
    assert after["counter"] > before["counter"]
    assert latest["device_interrupts"] > 0  # so it needs no quick timer here either
