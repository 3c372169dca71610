"""A test that leaves a network namespace, a cgroup or a mount behind is found out, by name."""

import os
import subprocess
from pathlib import Path

from handlers.host.vmm.cgroups import find_mount
from tests.guests.namespace import own_network
from tests.leaks import Snapshot, left_since


def test_a_named_namespace_is_left_until_it_is_deleted() -> None:
    before, name = Snapshot.take(), f"hostd-left-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
    try:
        assert f"network namespace {name}" in left_since(before, within_s=0)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=10)

    assert left_since(before, within_s=0) == []


def test_a_namespace_that_the_test_is_still_in_is_left() -> None:
    before = Snapshot.take()

    with own_network():
        inside = os.readlink("/proc/thread-self/ns/net")
        assert left_since(before, within_s=0) == [f"network namespace {inside}"]

    assert left_since(before, within_s=0) == []


def test_a_cgroup_is_left_until_it_is_removed() -> None:
    before, name = Snapshot.take(), f"hostd-test-{os.getpid()}-left"
    os.mkdir(f"{find_mount()}/{name}")
    try:
        assert left_since(before, within_s=0) == [f"cgroup {name}"]
    finally:
        os.rmdir(f"{find_mount()}/{name}")

    assert left_since(before, within_s=0) == []


def test_a_mount_is_left_until_it_is_gone(tmp_path: Path) -> None:
    before = Snapshot.take()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, timeout=10)
    try:
        assert left_since(before, within_s=0) == [f"mount {tmp_path}"]
    finally:
        subprocess.run(["umount", tmp_path], check=True, timeout=10)

    assert left_since(before, within_s=0) == []
