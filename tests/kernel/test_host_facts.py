"""Facts of the host agree with what other tools say."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from handlers.host.host_facts import HostFacts


def test_facts_agree_with_the_system(tmp_path: Path) -> None:
    facts = HostFacts()

    kib = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    assert abs(facts.memory_mib() - kib // 1024) <= 1
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", facts.boot_id())
    assert facts.boot_id() == facts.boot_id()
    release = subprocess.run(["uname", "-r"], check=True, capture_output=True, text=True).stdout
    assert facts.kernel_release() == release.strip()
    assert abs(facts.free_bytes(str(tmp_path)) - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert facts.cpu_model().isprintable()
    if os.uname().machine == "x86_64":
        assert facts.cpu_model().split()[0] in Path("/proc/cpuinfo").read_text()
