"""The lab is like a production host: true KVM, cgroup v2 with its controllers, nftables."""

import fcntl
import os
import subprocess
from pathlib import Path

KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS = 0xAE03, 10


def test_kvm_is_the_processors_own() -> None:
    kvm = os.open("/dev/kvm", os.O_RDWR)
    try:
        slots = fcntl.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS)
    finally:
        os.close(kvm)

    assert slots > 0
    assert Path("/sys/module/kvm_amd").is_dir()
    assert "svm" in Path("/proc/cpuinfo").read_text().split()


def test_cgroup_v2_has_the_controllers_that_limits_need() -> None:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    enabled = Path("/sys/fs/cgroup/cgroup.subtree_control").read_text().split()

    assert [fields[2] for fields in mounts if fields[1] == "/sys/fs/cgroup"] == ["cgroup2"]
    assert {"cpu", "io", "memory", "pids"} <= set(enabled)


def test_nftables_bridges_and_taps_are_available() -> None:
    for command in (
        "nft add table bridge lab-check",
        "nft delete table bridge lab-check",
        "ip link add lab-check type bridge",
        "ip tuntap add lab-check-0 mode tap",
        "ip link delete lab-check-0",
        "ip link delete lab-check",
    ):
        subprocess.run(command.split(), check=True)
