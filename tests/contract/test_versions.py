"""The version of the binaries that the settings name, read from the real ones."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.errors import HostFault
from handlers.host.vmm.binaries import VmmBinaries
from schemas.settings import Settings, VmmSettings
from tests.guests.firecracker import FIRECRACKER, JAILER, VERSION


def settings_with(firecracker: Path, jailer: Path) -> Settings:
    return Settings(vmm=VmmSettings(firecracker=str(firecracker), jailer=str(jailer)))


async def check_versions(settings: Settings) -> str:
    """As at the start of a worker; the version of new Starts."""
    binaries = VmmBinaries(settings)
    (await binaries.read(settings.vmm, ()))()
    return binaries.start


def stand_in(directory: Path, said: str) -> Path:
    program = directory / said.partition(" ")[0]
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    return program


async def test_the_pinned_binaries_are_of_one_supported_version() -> None:
    assert await check_versions(settings_with(FIRECRACKER, JAILER)) == VERSION


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("Firecracker v1.11.0", f"firecracker is 1.11.0, jailer is {VERSION}"),
        ("QEMU emulator version 7.2", "to print 'Firecracker v<version>', found 'QEMU emulator"),
        ("Jailer v1.12.1", "to print 'Firecracker v<version>', found 'Jailer v1.12.1'"),
    ],
)
async def test_other_programs_and_versions_are_refused(tmp_path: Path, said: str, why: str) -> None:
    with pytest.raises(HostFault, match=why):
        await check_versions(settings_with(stand_in(tmp_path, said), JAILER))


@pytest.mark.parametrize("version", ["1.11.9", "1.18.0", "2.0.0"])
async def test_an_unsupported_version_is_refused(tmp_path: Path, version: str) -> None:
    programs = [stand_in(tmp_path, f"{name} v{version}") for name in ("Firecracker", "Jailer")]

    with pytest.raises(HostFault, match=f"Firecracker {version} is not supported"):
        await check_versions(settings_with(*programs))


async def test_a_newer_version_than_is_known_can_be_allowed_an_older_one_cannot(
    tmp_path: Path,
) -> None:
    async def check(version: str) -> str:
        programs = [stand_in(tmp_path, f"{name} v{version}") for name in ("Firecracker", "Jailer")]
        settings = settings_with(*programs)
        vmm = replace(settings.vmm, allow_untested=True)
        return await check_versions(replace(settings, vmm=vmm))

    assert await check("1.99.0") == "1.99.0"
    with pytest.raises(HostFault, match=r"1\.11\.9 is not supported: install 1\.12 to [0-9.]*$"):
        await check("1.11.9")


async def test_the_paths_of_the_two_programs_are_not_interchangeable() -> None:
    with pytest.raises(HostFault, match=r"^\[vmm\] firecracker: .* found 'Jailer v"):
        await check_versions(settings_with(JAILER, FIRECRACKER))
    with pytest.raises(HostFault, match=r"^\[vmm\] jailer: .* found 'Firecracker v"):
        await check_versions(settings_with(FIRECRACKER, FIRECRACKER))


async def test_a_program_that_cannot_be_executed_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostFault, match=r"cannot execute .*nowhere"):
        await check_versions(settings_with(tmp_path / "nowhere", JAILER))
