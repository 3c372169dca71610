"""Checks before a start: ids of the jails that are in use, directories, file systems, programs."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.errors import Failure
from schemas.settings import (
    HostSettings,
    LimitSettings,
    NatsSettings,
    PathSettings,
    Settings,
    VmmSettings,
)
from worker.cli import run
from worker.cli.context import CliError
from worker.cli.run import check_uids
from worker.preflight import IdRange, check_connection, find_uid_overlap, prepare_dirs

BASE, COUNT = 1000, 10


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    for name in ("passwd", "group", "subuid", "subgid"):
        (tmp_path / name).write_text("")
    return tuple(str(tmp_path / name) for name in ("passwd", "group", "subuid", "subgid"))


def test_the_default_range_is_unused_on_this_machine() -> None:
    assert find_uid_overlap(Settings().vmm.uid_base, Settings().vmm.uid_count) is None


@pytest.mark.parametrize(
    ("name", "line", "taken"),
    [
        ("passwd", "ann:x:1000:0::/:/bin/sh", ("ann", 1000, 1)),
        ("passwd", "bob:x:1009:0::/:/bin/sh", ("bob", 1009, 1)),
        ("group", "staff:x:1004:ann", ("staff", 1004, 1)),
        ("subuid", "ann:100:901", ("ann", 100, 901)),
        ("subgid", "ann:1009:65536", ("ann", 1009, 65536)),
    ],
)
def test_an_overlap_names_file_and_owner(
    files: tuple[str, ...], tmp_path: Path, name: str, line: str, taken: tuple[str, int, int]
) -> None:
    (tmp_path / name).write_text(f"root:x:0:0::/:/bin/sh\nbroken\n:::\n{line}\n")

    assert find_uid_overlap(BASE, COUNT, files=files) == IdRange(str(tmp_path / name), *taken)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("passwd", "ann:x:999:1000::/:/bin/sh"),
        ("passwd", "ann:x:1010:0::/:/bin/sh"),
        ("subuid", "ann:100:900"),
        ("subgid", "ann:1010:65536"),
    ],
)
def test_adjacent_ranges_do_not_overlap(
    files: tuple[str, ...], tmp_path: Path, name: str, line: str
) -> None:
    (tmp_path / name).write_text(f"{line}\n")

    assert find_uid_overlap(BASE, COUNT, files=files) is None


def test_missing_files_assign_no_id(tmp_path: Path) -> None:
    assert find_uid_overlap(BASE, COUNT, files=(f"{tmp_path}/passwd",)) is None


def test_a_worker_does_not_start_with_ids_that_are_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = IdRange("/etc/subuid", "ann", 100_000, 65_536)

    def find(_base: int, _count: int) -> IdRange:
        return taken

    monkeypatch.setattr(run, "find_uid_overlap", find)

    with pytest.raises(CliError, match=r"invalid: vmm.uid_base.*overlaps ann in /etc/subuid"):
        check_uids(Settings())


def settings_in(directory: Path) -> Settings:
    program = directory / "firecracker"
    program.write_bytes(b"")
    program.chmod(0o755)
    return Settings(
        host=HostSettings(id="h1", production=False),
        paths=PathSettings(
            data=f"{directory}/data", state=f"{directory}/state", run=f"{directory}/run"
        ),
        vmm=VmmSettings(firecracker=str(program), jailer=str(program)),
        limits=LimitSettings(enforce=False),
    )


def test_its_own_directories_are_for_root_only(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)

    prepare_dirs(settings_in(tmp_path))

    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("state", "run")}
    assert modes == {"state": 0o700, "run": 0o700}


def test_a_production_host_does_not_run_without_limits(tmp_path: Path) -> None:
    settings = replace(settings_in(tmp_path), host=HostSettings(id="h1", production=True))

    with pytest.raises(Failure, match="enforce = false is for development"):
        prepare_dirs(settings)


@pytest.mark.parametrize(
    ("url", "tls", "creds", "problem"),
    [
        ("nats://10.0.0.1:4222", "", "/c", "nats://10.0.0.1:4222 is beyond loopback"),
        ("nats://nats.example:4222", "", "/c", "beyond loopback"),
        ("ws://10.0.0.1:4222", "", "/c", "beyond loopback"),
        ("nats://127.0.0.1:4222,nats://u:p@10.0.0.1:4222", "", "/c", "beyond loopback"),
        ("nats://127.0.0.1:4222", "", "", "without a credential"),
        ("tls://nats.example:4222", "", "", "without a credential"),
        ("nats://u:p@127.0.0.1:4222,nats://127.0.0.1:4223", "", "", "4223 is used without"),
        ("nats://127.0.0.1:4222", "", "/c", ""),
        ("nats://[::1]:4222,nats://localhost:4222", "", "/c", ""),
        ("nats://u:p@127.0.0.1:4222", "", "", ""),
        ("tls://nats.example:4222", "", "/c", ""),
        ("nats://nats.example:4222", "/ca.pem", "/c", ""),
    ],
)
def test_a_production_host_connects_with_tls_and_a_credential(
    url: str, tls: str, creds: str, problem: str
) -> None:
    production = Settings(nats=NatsSettings(url=url, tls=tls, creds=creds))

    with pytest.raises(Failure, match=re.escape(problem)) if problem else nullcontext() as raised:
        check_connection(production)

    assert raised is None or "u:p" not in str(raised.value)
    check_connection(replace(production, host=HostSettings(production=False)))


def test_a_jail_base_on_another_file_system_is_rejected(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    vmm = replace(settings.vmm, jail_base="/dev/shm/hostd-test-jails")

    try:
        with pytest.raises(Failure, match="another file system"):
            prepare_dirs(replace(settings, vmm=vmm))
    finally:
        Path(vmm.jail_base).rmdir()


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    vmm = replace(settings.vmm, jailer=f"{tmp_path}/nowhere")

    with pytest.raises(Failure, match=f"jailer: {tmp_path}/nowhere is missing"):
        prepare_dirs(replace(settings, vmm=vmm))
