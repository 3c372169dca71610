"""Several versions of Firecracker side by side, with the real programs: one under two numbers.

What is used, what is refused, what happens when files change, appear and go.
"""

import os
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.errors import HostFault
from handlers.host.vmm.binaries import VmmBinaries
from handlers.host.vmm.jailer import Jailer
from handlers.specs import LaunchSpec
from schemas.settings import PathSettings, Settings, VmmSettings
from tests.guests.firecracker import BIN, FIRECRACKER, JAILER, PINNED, VERSION, relabelled
from tests.vm.vmm_rig import need

OLDER, UNKNOWN = "1.12.0", "1.92.1"


class Installed:
    """An operator's directory, and the worker that reads it."""

    def __init__(self, directory: Path, *versions: str) -> None:
        need(BIN / "firecracker")
        if os.geteuid() != 0:
            assert not os.environ.get("CI"), "needs root"
            pytest.skip("needs root")
        self.directory, self.state = directory / "versions", directory / "state"
        self.state.mkdir()
        self.directory.mkdir(mode=0o755)
        self.vmm = VmmSettings(versions_dir=str(self.directory))
        for version in versions:
            self.add(version)
        self.restart()

    def add(self, version: str) -> None:
        relabelled(self.directory, version)

    def restart(self) -> None:
        paths = PathSettings(state=str(self.state))
        self.binaries = VmmBinaries(Settings(paths=paths, vmm=self.vmm))

    async def read(self, *in_use: str, **vmm: object) -> None:
        (await self.binaries.read(replace(self.vmm, **vmm), in_use))()

    def path(self, version: str, program: str = "firecracker") -> Path:
        return self.directory / f"{program}-v{version}"

    async def states(self, **sleeping: int) -> dict[str, str]:
        await self.binaries.look()
        counts = {(v.replace("_", "."), "sleeping"): n for v, n in sleeping.items()}
        return {each.version: each.state for each in self.binaries.states(counts)}


async def test_starts_use_the_newest_and_others_the_one_they_name(tmp_path: Path) -> None:
    installed = Installed(tmp_path, OLDER, PINNED)

    await installed.read()

    assert await installed.binaries.version_for(None) == PINNED
    assert await installed.binaries.version_for(OLDER) == OLDER
    pair = installed.binaries.pair(OLDER)
    assert Path(pair.firecracker).name == "firecracker"  # the jailer names the jails after it
    assert Path(pair.firecracker).read_bytes() == installed.path(OLDER).read_bytes()
    assert os.stat(Path(pair.jailer).parent).st_mode & 0o777 == 0o700
    assert await installed.states() == {OLDER: "installed", PINNED: "installed"}


async def test_the_operator_can_hold_starts_at_a_version(tmp_path: Path) -> None:
    installed = Installed(tmp_path, OLDER, PINNED)

    await installed.read(version=OLDER)

    assert await installed.binaries.version_for(None) == OLDER
    assert await installed.binaries.version_for(PINNED) == PINNED
    with pytest.raises(HostFault, match=r"no Firecracker 1\.15\.0 to start VMs with"):
        await installed.read(version="1.15.0")


async def test_a_version_that_is_not_here_is_named_with_what_to_do(tmp_path: Path) -> None:
    installed = Installed(tmp_path, PINNED)
    await installed.read()

    with pytest.raises(HostFault, match=r"put firecracker-v1\.14\.0 and jailer-v1\.14\.0 into"):
        await installed.binaries.version_for("1.14.0")

    assert await installed.states(**{"1_14_0": 2}) == {PINNED: "installed", "1.14.0": "missing"}


def for_others(path: Path) -> None:
    path.chmod(0o757)


def of_another(path: Path) -> None:
    os.chown(path, 1000, 0)


def a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(FIRECRACKER)


def gone(path: Path) -> None:
    path.unlink()


def not_executable(path: Path) -> None:
    path.chmod(0o644)


def another_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(OLDER.encode(), PINNED.encode()))


def no_program(path: Path) -> None:
    path.write_bytes(b"#!/bin/sh\necho Firecracker\n")


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (for_others, "only root may write it"),
    (of_another, "belong to root"),
    (a_link, "not a regular file"),
    (gone, "cannot be read: No such file"),
    (not_executable, "not executable"),
    (another_version, "must have the same version"),
    (no_program, "expected"),
]


@pytest.mark.parametrize("program", ["firecracker", "jailer"])
@pytest.mark.parametrize(("harm", "why"), BROKEN, ids=[harm.__name__ for harm, _ in BROKEN])
async def test_a_pair_that_is_not_as_it_must_be_is_refused_and_the_others_are_used(
    tmp_path: Path, harm: Callable[[Path], None], why: str, program: str
) -> None:
    installed = Installed(tmp_path, OLDER, PINNED)
    harm(installed.path(OLDER, program))

    await installed.read()

    assert await installed.binaries.version_for(None) == PINNED
    (refused,) = (s for s in installed.binaries.states({}) if s.version == OLDER)
    assert refused.state == "refused"
    assert why in str(refused.reason), refused
    with pytest.raises(HostFault, match="is not on this host"):
        await installed.binaries.version_for(OLDER)


async def test_a_pair_of_another_version_than_its_name_is_refused(tmp_path: Path) -> None:
    installed = Installed(tmp_path, OLDER, PINNED)
    await installed.read()
    for program in ("firecracker", "jailer"):
        another_version(installed.path(OLDER, program))

    await installed.read(OLDER)

    states = {each.version: each for each in installed.binaries.states({(OLDER, "sleeping"): 1})}
    assert "names say 1.12.0" in str(states[OLDER].reason)
    # What sleeps by it is woken by the copy of the real one.
    assert OLDER.encode() in Path(installed.binaries.pair(OLDER).firecracker).read_bytes()


async def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    installed = Installed(tmp_path, PINNED)
    installed.directory.chmod(0o777)

    with pytest.raises(HostFault, match="only root may write it"):
        await installed.read()


@pytest.mark.parametrize("found", [(), (UNKNOWN,)], ids=["nothing", "unknown"])
async def test_without_a_version_to_start_by_the_worker_says_why(
    tmp_path: Path, found: Collection[str]
) -> None:
    installed = Installed(tmp_path, *found)

    with pytest.raises(HostFault, match="no Firecracker to start VMs with") as failure:
        await installed.read()

    assert all("allow_untested" in str(failure.value) for _ in found)


async def test_a_newer_version_than_is_known_is_used_if_that_is_allowed(tmp_path: Path) -> None:
    installed = Installed(tmp_path, PINNED, UNKNOWN)
    await installed.read()
    assert await installed.binaries.version_for(None) == PINNED
    assert await installed.states() == {PINNED: "installed", UNKNOWN: "refused"}

    await installed.read(allow_untested=True)

    assert await installed.binaries.version_for(None) == UNKNOWN


@pytest.mark.parametrize("program", ["firecracker", "jailer"])
@pytest.mark.parametrize("copy", [False, True], ids=["file", "copy"])
async def test_a_file_that_changes_under_the_worker_is_not_launched_until_it_is_accepted(
    tmp_path: Path, program: str, *, copy: bool
) -> None:
    installed = Installed(tmp_path, OLDER, PINNED)
    await installed.read()
    path = installed.path(PINNED, program)
    changed = Path(getattr(installed.binaries.pair(PINNED), program)) if copy else path
    with changed.open("ab") as file:
        file.write(b"!")

    with pytest.raises(HostFault, match="changed while hostd runs"):
        await installed.binaries.version_for(None)

    assert await installed.binaries.version_for(OLDER) == OLDER
    assert (await installed.states())[PINNED] == "changed"
    await installed.read()  # as by SIGHUP
    assert await installed.binaries.version_for(None) == PINNED
    assert (await installed.states())[PINNED] == "installed"
    assert Path(getattr(installed.binaries.pair(PINNED), program)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
async def test_a_removed_version_still_wakes_what_sleeps_by_it(
    tmp_path: Path, *, restarted: bool
) -> None:
    installed = Installed(tmp_path, OLDER, PINNED)
    await installed.read()
    for program in ("firecracker", "jailer"):
        installed.path(OLDER, program).unlink()
    if restarted:
        installed.restart()
        await installed.read(OLDER)

    assert await installed.binaries.version_for(OLDER) == OLDER
    await installed.binaries.look()
    (older,) = (s for s in installed.binaries.states({(OLDER, "sleeping"): 3}) if s.sleeping)
    assert (older.state, older.in_trouble) == ("removed", True)
    await installed.read(PINNED)  # nothing sleeps by it any more
    installed.restart()
    await installed.read(PINNED)
    assert await installed.states() == {PINNED: "installed"}
    assert sorted(each.name for each in (installed.state / "vmm").iterdir()) == [f"v{PINNED}"]


async def test_copies_are_kept_while_it_is_not_known_what_is_in_use(tmp_path: Path) -> None:
    installed = Installed(tmp_path, OLDER, PINNED)
    await installed.read()
    installed.path(OLDER).unlink()
    installed.restart()

    await installed.read("", PINNED)

    assert await installed.binaries.version_for(OLDER) == OLDER


async def test_a_version_that_appears_is_used_once_the_directory_is_read_again(
    tmp_path: Path,
) -> None:
    installed = Installed(tmp_path, OLDER)
    await installed.read()
    installed.add(PINNED)
    assert await installed.binaries.version_for(None) == OLDER

    await installed.read()

    assert await installed.binaries.version_for(None) == PINNED


async def test_without_the_directory_the_pair_of_the_settings_is_used_as_it_is(
    tmp_path: Path,
) -> None:
    need(FIRECRACKER)
    vmm = VmmSettings(firecracker=str(tmp_path / "firecracker"), jailer=str(tmp_path / "jailer"))
    for program, path in (("firecracker", FIRECRACKER), ("jailer", JAILER)):
        (tmp_path / program).write_bytes(path.read_bytes())
        (tmp_path / program).chmod(0o755)
    binaries = VmmBinaries(Settings(vmm=vmm))

    assert await binaries.version_for(None) == VERSION
    assert binaries.pair(VERSION).firecracker == vmm.firecracker
    assert set(binaries.pair(VERSION).sha256) == {"firecracker", "jailer"}

    relabelled(tmp_path / "other", OLDER)
    for program in ("firecracker", "jailer"):
        os.replace(tmp_path / "other" / f"{program}-v{OLDER}", tmp_path / program)
    assert await binaries.version_for(None) == OLDER
    with pytest.raises(HostFault, match="is not on this host"):
        await binaries.version_for(VERSION)
    # A launch that was admitted before takes the pair that is here.
    assert binaries.unchanged_pair(VERSION).text == OLDER
    spec = LaunchSpec("0123456789ab-1", 100_000, "hostd/acme/0123456789ab-1", version=VERSION)
    arguments = Jailer(Settings(vmm=vmm), binaries).arguments(spec)
    assert (arguments[0], arguments[4]) == (vmm.jailer, vmm.firecracker)


async def test_with_the_directory_a_launch_takes_the_version_it_was_admitted_with(
    tmp_path: Path,
) -> None:
    installed = Installed(tmp_path, OLDER, PINNED)
    await installed.read()

    assert installed.binaries.unchanged_pair(OLDER).text == OLDER
    with pytest.raises(HostFault, match="is not on this host"):
        installed.binaries.launch_pair("1.14.0")
