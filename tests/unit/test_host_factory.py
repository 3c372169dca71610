"""What a worker refuses to start with, and what it says then."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.errors import Failure
from handlers.host.lock import HostLock
from schemas.codes import EXIT_CODES, Code
from schemas.settings import HostSettings, LimitSettings, PathSettings, Settings, VmmSettings
from worker.host_factory import prepare_dirs
from worker.main import run


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


def test_its_own_directories_are_roots_alone(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)

    prepare_dirs(settings_in(tmp_path))

    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("state", "run")}
    assert modes == {"state": 0o700, "run": 0o700}


def test_a_production_host_does_not_run_without_limits(tmp_path: Path) -> None:
    settings = replace(settings_in(tmp_path), host=HostSettings(id="h1", production=True))

    with pytest.raises(Failure, match="enforce = false is for developers"):
        prepare_dirs(settings)


def test_a_jail_base_elsewhere_cannot_be_linked_into(tmp_path: Path) -> None:
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


def test_a_second_worker_ends_with_the_code_of_a_conflict(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    prepare_dirs(settings)

    with HostLock(settings.paths.run):
        assert run(settings) == EXIT_CODES[Code.CONFLICT]


def test_a_host_that_is_not_fit_ends_with_the_code_of_a_fault(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)

    assert run(replace(settings, host=HostSettings(id="h1"))) == EXIT_CODES[Code.HOST_FAULT]
