"""Facts of the host agree with the output of other tools."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from handlers.errors import HostFault
from handlers.host import facts
from handlers.host.facts import HostFacts, file_system
from schemas.settings import LimitSettings, PathSettings, Settings
from worker.preflight import check_on_disk


def test_facts_agree_with_the_system() -> None:
    host = HostFacts()

    kib = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    assert abs(host.memory_mib() - kib // 1024) <= 1
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", host.boot_id())
    assert host.boot_id() == host.boot_id()
    release = subprocess.run(["uname", "-r"], check=True, capture_output=True, text=True).stdout
    assert host.kernel_release() == release.strip()
    assert host.hostname() == os.uname().nodename
    assert host.cpu_model().isprintable()
    if os.uname().machine == "x86_64":
        assert host.cpu_model().split()[0] in Path("/proc/cpuinfo").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4C4C4544-0051-3110-8051-B7C04F4E3332\n", "4c4c4544-0051-3110-8051-b7c04f4e3332"),
        ("00000000-0000-0000-0000-000000000000\n", ""),
        ("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF\n", ""),
        ("\n", ""),
        (None, ""),
    ],
)
def test_a_product_uuid_identifies_a_machine_or_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: str
) -> None:
    path = tmp_path / "product_uuid"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(facts, "PRODUCT_UUID", str(path))

    assert HostFacts().product_uuid() == expected


def test_only_addresses_of_devices_are_facts_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, device, address in (
        ("eth1", True, "02:00:00:00:00:02"),
        ("eth0", True, "02:00:00:00:00:01"),
        ("br-tenant-3", False, "02:00:00:00:00:03"),
        ("can0", True, ""),
        ("dummy", True, "00:00:00:00:00:00"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "address").write_text(f"{address}\n")
        if device:
            (tmp_path / name / "device").mkdir()
    monkeypatch.setattr(facts, "NET", str(tmp_path))

    assert HostFacts().macs() == ("02:00:00:00:00:01", "02:00:00:00:00:02")


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
