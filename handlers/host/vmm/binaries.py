"""The pairs of firecracker and jailer that launches execute: one, or several versions side by side.

Without `[vmm] versions_dir` it is the pair of `[vmm] firecracker` and `jailer`, whatever version it
has at the moment of a launch. With it, the pairs `firecracker-vX.Y.Z` and `jailer-vX.Y.Z` of that
directory. Each is copied to `<state>/vmm/vX.Y.Z/`, root-only, since the jailer names the jails'
directory after the executable; the copy is what runs. So a pair whose files are removed still wakes
what sleeps by it; one whose files change is refused until the directory is read again (SIGHUP, or a
start).
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from handlers.errors import Failure, HostFault
from handlers.host.linux.file_id import FileId
from handlers.host.linux.file_threads import run_in_thread
from handlers.host.vmm.binary_files import (
    JAILER,
    Stamp,
    copy_pair,
    digests,
    move_pair,
    read_sources,
    stamp_of,
)
from handlers.host.vmm.versions import (
    Version,
    check_supported,
    lacks,
    parse_version,
    text_of,
    version_of_pair,
)
from handlers.jail_names import FIRECRACKER
from handlers.specs import VersionState
from schemas.settings import Settings, VmmSettings

COPY: Final = re.compile(r"v([0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4})")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Pair:
    """What a launch executes. `sources` are the operator's files, of which the paths are copies;
    `stamps` are of all of these files. `removed`: the sources are gone."""

    version: Version
    firecracker: str
    jailer: str
    sources: tuple[str, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict[str, Stamp])
    sha256: Mapping[str, str] = field(default_factory=dict[str, str])
    removed: bool = False

    @property
    def text(self) -> str:
        return text_of(self.version)

    def changed(self) -> str | None:
        """The first file that is not what was read; a source that is gone is none."""
        for path, known in self.stamps.items():
            now = stamp_of(path)
            if now != known and not (now is None and path in self.sources):
                return path
        return None

    def is_removed(self) -> bool:
        return self.removed or any(stamp_of(path) is None for path in self.sources)


@dataclass(frozen=True, slots=True)
class Scan:
    """What a look at the settings and files found. `problems`: why a version is not used."""

    pairs: Mapping[str, Pair]
    start: str
    problems: Mapping[str, str] = field(default_factory=dict[str, str])
    stamps: tuple[Stamp, ...] = ()


class VmmBinaries:
    """The pairs of one worker. Until they are read it has the pair of the settings, unchecked."""

    def __init__(self, settings: Settings) -> None:
        self._vmm = settings.vmm
        self._copies = f"{settings.paths.state}/vmm"
        vmm = settings.vmm
        self._seen: dict[str, tuple[str | None, bool]] = {}
        self._scan = Scan({"": Pair((0, 0, 0), vmm.firecracker, vmm.jailer)}, "")

    @property
    def start(self) -> str:
        """The version of new Starts."""
        return self._scan.start

    # -- what a launch asks --------------------------------------------------------------------

    async def version_for(self, wanted: str | None, *, reread: bool = True) -> str:
        """The version of a launch: the `wanted` one, or that of new Starts.

        Raises:
            HostFault: it is not on this host, or its files changed under the running worker.
        """
        if self._vmm.versions_dir:
            return (await run_in_thread(self.unchanged_pair, wanted or "")).text
        if reread and await run_in_thread(single_stamps, self._vmm) != self._scan.stamps:
            (await self.read(self._vmm, ()))()
        return self.pair(wanted or "").text

    def pair(self, version: str) -> Pair:
        """That of a version; "" is that of new Starts.

        Raises:
            HostFault: it is not on this host.
        """
        found = self._scan.pairs.get(version or self.start)
        if found is None:
            have = ", ".join(sorted(self._scan.pairs)) or "none"
            raise HostFault(
                f"Firecracker {version} is not on this host (found: {have}): put "
                f"firecracker-v{version} and jailer-v{version} into [vmm] versions_dir and send "
                "SIGHUP; see docs/operations.md#upgrading-firecracker"
            )
        return found

    def launch_pair(self, version: str) -> Pair:
        """As `pair`, for a launch that was admitted with this version.

        Without `versions_dir` it is the pair that is here, which the operator may have replaced
        since: a Start takes it and records what it is; a Wake compares it before the load.
        """
        return self.pair(version if self._vmm.versions_dir else "")

    def unchanged_pair(self, version: str) -> Pair:
        """As `launch_pair`. It looks at the files and blocks.

        Raises:
            HostFault: also if the files changed under the running worker.
        """
        found = self.launch_pair(version)
        if (path := found.changed()) is not None:
            raise HostFault(
                f"{path} changed while hostd runs, so Firecracker {found.text} is not launched: "
                "restore it, or accept it by SIGHUP (systemctl reload hostd)",
                path=path,
            )
        return found

    def files(self) -> set[FileId | None]:
        """All that a process of hostd's may execute outside of a jail."""
        stamps = [stamp for pair in self._scan.pairs.values() for stamp in pair.stamps.values()]
        known: set[FileId | None] = {
            stamp[0] for stamp in (*stamps, *self._scan.stamps) if stamp is not None
        }
        return known or {FileId.at(path) for path in (self._vmm.firecracker, self._vmm.jailer)}

    def current(self) -> object:
        """Another one, when a Start executes other files than before, as of the last look."""
        return self.start, self._scan.stamps, dict(self._scan.pairs[self.start].sha256)

    async def look(self) -> None:
        """Look at the files, for `states`."""
        pairs = self._scan.pairs

        def seen() -> dict[str, tuple[str | None, bool]]:
            return {name: (pair.changed(), pair.is_removed()) for name, pair in pairs.items()}

        self._seen = await run_in_thread(seen)

    def states(self, counts: Mapping[tuple[str, str], int]) -> list[VersionState]:
        """Every version that is here or in use. `counts`: instances by version and `running` or
        `sleeping`; the version "" is one that is not known. As of the last look at the files."""
        scan = self._scan
        found: list[VersionState] = []
        for version in sorted({*scan.pairs, *scan.problems, *(name for name, _ in counts)}):
            pair, running, sleeping = (
                scan.pairs.get(version),
                *(counts.get((version, each), 0) for each in ("running", "sleeping")),
            )
            problem = scan.problems.get(version)
            if pair is None:
                used = running + sleeping > 0
                state = "missing" if used or problem is None else "refused"
            else:
                path, removed = self._seen.get(version, (None, pair.removed))
                state = "changed" if path else "removed" if removed else "installed"
                problem = f"{path} is not what it was" if path else problem
            found.append(
                VersionState(
                    version=version or "unknown",
                    state=state if version else "unknown",
                    reason=problem,
                    starts=version == scan.start,
                    running=running,
                    sleeping=sleeping,
                    sha256={} if pair is None else pair.sha256,
                    lacks=() if pair is None else tuple(lacks(pair.version)),
                    one_pair=not self._vmm.versions_dir,
                )
            )
        return found

    # -- reading -------------------------------------------------------------------------------

    async def read(self, vmm: VmmSettings, in_use: Collection[str]) -> Callable[[], None]:
        """Read what the settings name; what is returned puts it into effect, for later launches.

        `in_use`: versions that instances run or sleep by; "" is one that is not known. Their copies
        are kept, though their files are gone; with "" all copies are.

        Raises:
            HostFault: there is no version that a Start may use; names each and why.
        """
        if vmm.versions_dir:
            scan = await self._scan_several(vmm, in_use)
        else:
            scan = await self._scan_single(vmm)
        return lambda: self._use(scan, vmm)

    def _use(self, scan: Scan, vmm: VmmSettings) -> None:
        self._scan, self._vmm, self._seen = scan, vmm, {}
        for pair in scan.pairs.values():
            starts = pair.text == scan.start
            log.info("vmm.version_found", version=pair.text, starts=starts, **pair.sha256)
        for version, why in scan.problems.items():
            log.warning("vmm.version_refused", version=version, reason=why)

    async def _scan_several(self, vmm: VmmSettings, in_use: Collection[str]) -> Scan:
        sources, problems = await run_in_thread(read_sources, vmm.versions_dir)
        pairs: dict[str, Pair] = {}
        for version, paths in sources.items():
            try:
                pairs[version] = await self._take(version, paths, vmm)
            except (Failure, OSError) as error:
                problems[version] = str(error)
        for version in await run_in_thread(self._copied):
            if version in pairs:
                continue
            if version in in_use or "" in in_use:
                with contextlib.suppress(Failure, OSError):
                    pairs[version] = await self._keep(version)
            elif version not in self._scan.pairs:  # else a launch may be about to execute it
                await run_in_thread(shutil.rmtree, f"{self._copies}/v{version}")
        return Scan(pairs, start_of(pairs, problems, vmm), problems)

    async def _scan_single(self, vmm: VmmSettings) -> Scan:
        stamps = single_stamps(vmm)
        version = await version_of_pair(vmm.firecracker, vmm.jailer)
        check_supported(version, allow_untested=vmm.allow_untested)
        sha256 = await run_in_thread(digests, (vmm.firecracker, vmm.jailer))
        pair = Pair(version, vmm.firecracker, vmm.jailer, sha256=sha256)
        return Scan({pair.text: pair}, pair.text, stamps=stamps)

    async def _take(self, version: str, paths: tuple[str, str], vmm: VmmSettings) -> Pair:
        """Copy a pair, unless that was done, and ask it for its version."""
        number = parse_version(version)
        check_supported(number, allow_untested=vmm.allow_untested)
        copies = self._paths(version)
        stamps = {path: stamp_of(path) for path in paths}  # before they are read
        sha256 = await run_in_thread(digests, paths)
        if sha256 != await run_in_thread(digests, copies):
            new = self._paths(f"{version}.new")
            await run_in_thread(copy_pair, paths, new, sha256)
            await self._check_version(new, number)
            await run_in_thread(move_pair, new, copies)
        await self._check_version(copies, number)
        stamps |= {path: stamp_of(path) for path in copies}
        return Pair(number, *copies, sources=paths, stamps=stamps, sha256=sha256)

    async def _keep(self, version: str) -> Pair:
        """The copies of a pair whose sources are gone."""
        number, copies = parse_version(version), self._paths(version)
        stamps = {path: stamp_of(path) for path in copies}
        sha256 = await run_in_thread(digests, copies)
        await self._check_version(copies, number)
        return Pair(number, *copies, stamps=stamps, sha256=sha256, removed=True)

    async def _check_version(self, paths: tuple[str, str], wanted: Version) -> None:
        if (found := await version_of_pair(*paths)) != wanted:
            raise HostFault(
                f"the programs are version {text_of(found)}, their names say {text_of(wanted)}"
            )

    def _paths(self, version: str) -> tuple[str, str]:
        directory = f"{self._copies}/v{version}"
        return f"{directory}/{FIRECRACKER}", f"{directory}/{JAILER}"

    def _copied(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            found = (COPY.fullmatch(name) for name in os.listdir(self._copies))
            return sorted(match[1] for match in found if match is not None)
        return []


def start_of(pairs: Mapping[str, Pair], problems: Mapping[str, str], vmm: VmmSettings) -> str:
    """The version of new Starts: `[vmm] version`, or the newest whose files are there.

    Raises:
        HostFault: there is none.
    """
    there = [pair for pair in pairs.values() if not pair.removed]
    if vmm.version:
        there = [pair for pair in there if pair.text == vmm.version]
    if there:
        return max(there, key=lambda pair: pair.version).text
    wanted = f"Firecracker {vmm.version}" if vmm.version else "Firecracker"
    why = "; ".join(f"{version}: {text}" for version, text in sorted(problems.items()))
    raise HostFault(
        f"no {wanted} to start VMs with in [vmm] versions_dir {vmm.versions_dir}"
        + (f": {why}" if why else ": put firecracker-vX.Y.Z and jailer-vX.Y.Z there")
    )


def single_stamps(vmm: VmmSettings) -> tuple[Stamp, ...]:
    """Of the pair of `[vmm] firecracker` and `jailer`."""
    return stamp_of(vmm.firecracker), stamp_of(vmm.jailer)
