"""Processes that have a uid of `[vmm]`: none is missed, whatever jail or cgroup it is in."""

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from handlers.host.jail.layout import JailLayout
from handlers.host.vmm.processes import read_cgroup
from handlers.host.vmm.vmm_processes import list_vmm_processes

JAIL = "0123456789ab-1"
PROGRAM = """
import os, sys
root, uid = sys.argv[1], int(sys.argv[2])
if root:
    os.chroot(root)
os.setgid(uid)
os.setuid(uid)
block = bytearray(96 << 20)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def as_uid(uid: int, root: str = "") -> Generator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", PROGRAM, root, str(uid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            process.kill()


def test_all_are_listed_with_their_jail_size_and_cgroup(tmp_path: Path) -> None:
    base = 1_900_000_000 + os.getpid() % 100_000 * 8
    uids, layout = range(base, base + 4), JailLayout(str(tmp_path))
    root = Path(layout.root(JAIL))
    root.mkdir(parents=True)
    assert list_vmm_processes(uids, layout) == []

    with (
        as_uid(base, str(root)) as jailed,
        as_uid(base + 3) as loose,
        as_uid(base + 4) as foreign,
    ):
        found = {each.pid: each for each in list_vmm_processes(uids, layout)}
        mine = read_cgroup(os.getpid())

    assert set(found) == {jailed.pid, loose.pid}
    assert foreign.pid not in found
    assert [found[each.pid].uid for each in (jailed, loose)] == [base, base + 3]
    assert [found[each.pid].jail_id for each in (jailed, loose)] == [JAIL, None]
    assert {each.cgroup for each in found.values()} == {mine}
    assert all(96 <= each.size_mib < 2048 for each in found.values())


def test_a_zombie_is_not_listed(tmp_path: Path) -> None:
    base = 1_900_800_000 + os.getpid() % 100_000 * 8
    with as_uid(base) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        assert list_vmm_processes(range(base, base + 1), JailLayout(str(tmp_path))) == []
