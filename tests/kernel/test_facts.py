"""Facts of the host agree with what other tools say."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from handlers.errors import HostFault
from handlers.host.facts import HostFacts, file_system
from schemas.settings import LimitSettings, PathSettings, Settings
from worker.preflight import check_on_disk


def test_facts_agree_with_the_system() -> None:
    facts = HostFacts()

    kib = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    assert abs(facts.memory_mib() - kib // 1024) <= 1
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", facts.boot_id())
    assert facts.boot_id() == facts.boot_id()
    release = subprocess.run(["uname", "-r"], check=True, capture_output=True, text=True).stdout
    assert facts.kernel_release() == release.strip()
    assert facts.cpu_model().isprintable()
    if os.uname().machine == "x86_64":
        assert facts.cpu_model().split()[0] in Path("/proc/cpuinfo").read_text()


def test_the_file_system_of_a_path_is_named(tmp_path: Path, tmpfs: Path) -> None:
    findmnt = ["findmnt", "-no", "FSTYPE", "-T", str(tmp_path)]
    expected = subprocess.run(findmnt, check=True, capture_output=True, text=True).stdout.strip()

    assert file_system(str(tmp_path)) == expected
    assert file_system(str(tmpfs)) == "tmpfs"


def test_a_state_directory_in_memory_is_refused_where_limits_are_in_force(tmpfs: Path) -> None:
    paths = PathSettings(state=str(tmpfs))
    check_on_disk(Settings(paths=paths, limits=LimitSettings(enforce=False)))

    with pytest.raises(HostFault, match="is in memory"):
        check_on_disk(Settings(paths=paths, limits=LimitSettings(enforce=True)))
