"""What hostd owns on this host, counted from the kernel and the file systems, not the journal.

A resource is hostd's by its mark: an interface by its alias, an nftables element by its set, a
cgroup by its path, a jail by its ID, a process by the jail or the cgroup it is in. So resources of
other tools are never counted, and resources missing in the journal are. Reads only; what disappears
during the count is not counted.

Not counted: zombies, kept volumes, launch logs, tombstones, hostd's tables without tenants.
A VMM that was launched ahead counts once, in `warm`, with its process, jail and cgroup.
"""

import asyncio
import os
import re
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import msgspec

from handlers.host.jail.layout import JailLayout
from handlers.host.jail.warm_jails import WarmLayout
from handlers.host.linux.file_id import FileId
from handlers.host.linux.kernel_thread import no_namespace
from handlers.host.linux.procfs import list_pids
from handlers.host.net.chains import CARRIED
from handlers.host.net.host_network import open_network_mechanisms
from handlers.host.snapshot.manifest import CONSUMED, MANIFEST
from handlers.host.vmm.cgroups import CgroupTree
from handlers.host.vmm.processes import read_cgroup, read_stat
from handlers.jail_names import FIRECRACKER, MEMORY
from schemas import naming
from schemas.settings import NetworkSettings, Settings

DRIVE = ".ext4"
LINKS_OF_A_LEAF = 2  # of its name and its "."
# The names of files that hostd writes and then renames.
TEMPORARY_SUFFIXES = (".part", ".tmp")
TEMPORARY_OF_AGENTD_FILE = re.compile(r"\..+\.hostd")
AGENTD_FILES_MAX = 1_000
# The directories in which hostd replaces a file, below `tenants/`.
AGENTD_LAYOUT = (
    naming.ID_PATTERN,
    re.compile("pools"),
    naming.ID_PATTERN,
    re.compile("instances"),
    naming.ID_PATTERN,
)


class Inventory(msgspec.Struct, frozen=True):
    """Names of all resources of hostd, by kind, sorted."""

    processes: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    bridges: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    jails: tuple[str, ...] = ()
    nft: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    temp: tuple[str, ...] = ()
    warm: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many, for every kind."""
        return {kind: len(getattr(self, kind)) for kind in self.__struct_fields__}


def collect(settings: Settings, *, enter: Callable[[], None] = no_namespace) -> Inventory:
    """Read the whole host. Blocks: call it from a thread if an event loop runs.

    Args:
        settings: where hostd's directories and cgroups are.
        enter: enters the network namespace to read; by default the caller's.

    Raises:
        Failure: the kernel denies a read, e.g. without CAP_NET_ADMIN.

    Needs: CAP_NET_ADMIN for nftables, CAP_SYS_PTRACE for processes, CAP_DAC_READ_SEARCH for files.
    """
    with ThreadPoolExecutor(1) as thread:
        network = thread.submit(asyncio.run, _network(settings.network, enter))
        layout = JailLayout(settings.jail_base)
        jails = _jails(layout)
        roots = [layout.root(jail) for jail in jails]
        warm_base = f"{settings.limits.cgroup}/{naming.WARM_CGROUP}"
        cgroups = _cgroups(settings)
        sockets, disks = _in_jails(roots)
        snapshots, unused = _snapshots(f"{settings.paths.state}/snapshots")
        bridges, taps, nft = network.result()
    return Inventory(
        processes=_processes(roots, settings.limits.cgroup),
        taps=taps,
        bridges=bridges,
        cgroups=tuple(name for name in cgroups if not f"{name}/".startswith(f"{warm_base}/")),
        jails=jails,
        nft=nft,
        sockets=_sorted(sockets),
        disks=_sorted(disks),
        snapshots=snapshots,
        artifacts=_sorted(
            path
            for path in _at_depth(f"{settings.paths.state}/artifacts", 3)
            if not _temporary(path)
        ),
        temp=_sorted([*unused, *_temp(settings)]),
        warm=_sorted([*{*WarmLayout(settings.jail_base).list_ids(), *_warm(cgroups, warm_base)}]),
    )


# -- network ---------------------------------------------------------------------------------------


async def _network(
    settings: NetworkSettings, enter: Callable[[], None]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Bridges, TAPs, and the elements of tenants and guests in hostd's tables."""
    mechanisms = open_network_mechanisms(settings, enter)
    try:
        bridges, taps = await mechanisms.networks.owned_links()
        elements = [
            f"{family} {name} {' . '.join(element)}"
            for family, names in CARRIED.items()
            for name in names
            for element in await mechanisms.nft.members(f"{family} hostd {name}")
        ]
    finally:
        mechanisms.close()
    return bridges, taps, _sorted(elements)


# -- processes and cgroups -------------------------------------------------------------------------


def _processes(roots: list[str], cgroup: str) -> tuple[str, ...]:
    """Live processes whose root or executable is in one of the jails, or that are in the cgroup.

    Without the kernel thread that KVM puts into the cgroup for each VM (kvm-nx-lpage-recovery).
    Compared by device and inode: in its mount namespace a jailed process has the root `/` and the
    executable `/firecracker`. Source: proc_pid_root(5), proc_pid_exe(5).
    """
    ours = {
        FileId.of(found)
        for root in roots
        for path in (root, f"{root}/{FIRECRACKER}")
        if (found := _lstat(path))
    }
    return tuple(str(pid) for pid in list_pids() if _is_ours(pid, ours, cgroup))


def _is_ours(pid: int, files: set[FileId], cgroup: str) -> bool:
    """Asks little about the many that are not."""
    found = f"{read_cgroup(pid)}/"
    if found.startswith(f"{cgroup}/{naming.WARM_CGROUP}/"):
        return False  # counted as `warm`
    in_our_cgroup = found.startswith(f"{cgroup}/")
    try:
        if in_our_cgroup:
            ours = FileId.at(f"/proc/{pid}/exe") is not None  # a kernel thread has none
        else:
            ours = any(FileId.at(f"/proc/{pid}/{link}") in files for link in ("root", "exe"))
    except PermissionError:  # of another user namespace, or protected: not a VMM of hostd
        ours = in_our_cgroup
    return ours and _is_alive(pid)


def _is_alive(pid: int) -> bool:
    found = read_stat(pid)
    return found is not None and found[0] not in "ZX"


def _cgroups(settings: Settings) -> tuple[str, ...]:
    """The leaves below `[limits] cgroup`; an empty directory of a tenant counts as one."""
    tree = CgroupTree.of(settings)
    base = tree.path(tree.base)
    return _sorted(path[len(tree.mount) + 1 :] for path in _leaves(base) if path != base)


def _leaves(path: str) -> Iterator[str]:
    """Directories without one in them, here and below. A cgroup has some 30 files, so that it is
    not listed if its link count says that it has no other in it (inode(7))."""
    found = _lstat(path)
    if found is None:
        return
    inner: list[str] = []
    if found.st_nlink != LINKS_OF_A_LEAF:
        inner = [entry.path for entry in _entries(path) if entry.is_dir(follow_symlinks=False)]
    if not inner:
        yield path
    for each in inner:
        yield from _leaves(each)


def _warm(cgroups: tuple[str, ...], base: str) -> Iterator[str]:
    """The IDs of VMMs launched ahead that have a cgroup."""
    return (name.removeprefix(f"{base}/") for name in cgroups if name.startswith(f"{base}/"))


# -- files -----------------------------------------------------------------------------------------


def _jails(layout: JailLayout) -> tuple[str, ...]:
    """IDs of the jails that hostd made, complete or not."""
    return _sorted(layout.list_ids())


def _in_jails(roots: list[str]) -> tuple[list[str], list[str]]:
    """Sockets and drives in the jails, at most one directory deep: hostd makes none below that."""
    sockets: list[str] = []
    drives: list[str] = []
    for root in roots:
        jails = len(os.path.dirname(os.path.dirname(root))) + 1
        for entry in _files_in(root):
            if entry.is_file(follow_symlinks=False):
                if entry.name.endswith(DRIVE):
                    drives.append(entry.path[jails:])
            elif (found := _lstat(entry.path)) and stat.S_ISSOCK(found.st_mode):
                sockets.append(entry.path[jails:])
    return sockets, drives


def _files_in(root: str) -> "Iterator[os.DirEntry[str]]":
    for entry in _entries(root):
        if entry.is_dir(follow_symlinks=False):
            inner = _entries(entry.path)
            yield from (each for each in inner if not each.is_dir(follow_symlinks=False))
        else:
            yield entry


def _snapshots(base: str) -> tuple[tuple[str, ...], list[str]]:
    """Published snapshots as `<t>/<p>/<i>/<n>`, and the paths of directories that nothing uses."""
    published: list[str] = []
    unused: list[str] = []
    for path in _at_depth(base, 4):
        if os.path.exists(f"{base}/{path}/{MANIFEST}") and not _temporary(path):
            published.append(path)
        elif not _woken(f"{base}/{path}"):
            unused.append(f"{base}/{path}")
    return _sorted(published), unused


def _woken(directory: str) -> bool:
    """Whether a VM that was woken from it still maps its memory: its jail has a hard link."""
    memory = _lstat(f"{directory}/{MEMORY}")
    return memory is not None and memory.st_nlink > 1 and os.path.exists(f"{directory}/{CONSUMED}")


def _temp(settings: Settings) -> Iterator[str]:
    """Paths of what was written, but not renamed into place."""
    state, data = settings.paths.state, settings.paths.data
    for base in (state, *(f"{state}/{kind}" for kind in ("artifacts", "snapshots", "logs"))):
        for path, directories, names in _walk(base):
            if base == state:
                directories.clear()
            elif base.endswith("/snapshots") and _depth(path, base) >= 3:
                directories.clear()  # `_snapshots` counts a snapshot's directory as one
            yield from (f"{path}/{name}" for name in names if _temporary(name))
            yield from (f"{path}/{name}" for name in directories if _temporary(name))
            directories[:] = [name for name in directories if not _temporary(name)]
    yield from islice(_temporary_of_agentd(f"{data}/tenants"), AGENTD_FILES_MAX)


def _temporary_of_agentd(directory: str, depth: int = 0) -> Iterator[str]:
    """What hostd left in agentd's directories: no deeper than `<t>/pools/<p>/instances/<i>/`.

    agentd may put anything there: what hostd cannot have made, or cannot be read, is left out.
    """
    try:
        with os.scandir(directory) as found:
            entries = [
                (entry.path, entry.name, entry.is_dir(follow_symlinks=False)) for entry in found
            ]
    except OSError:
        return
    for path, name, is_directory in entries:
        if not name.isprintable():
            continue
        if is_directory and depth < len(AGENTD_LAYOUT) and AGENTD_LAYOUT[depth].fullmatch(name):
            yield from _temporary_of_agentd(path, depth + 1)
        elif depth and not is_directory and TEMPORARY_OF_AGENTD_FILE.fullmatch(name):
            yield path


def _temporary(path: str) -> bool:
    name = os.path.basename(path)
    return name.endswith(TEMPORARY_SUFFIXES) or name.startswith(".")


def _at_depth(base: str, depth: int) -> Iterator[str]:
    """Directories that many levels below, relative to the base; no symlink is followed."""
    for path, directories, _ in _walk(base):
        if _depth(path, base) == depth - 1:
            yield from (os.path.relpath(f"{path}/{name}", base) for name in directories)
            directories.clear()


def _entries(path: str) -> "list[os.DirEntry[str]]":
    """What is in a directory; fails if it is unreadable, not if it is missing."""
    try:
        with os.scandir(path) as found:
            return [*found]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _walk(base: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk without following symlinks; fails if unreadable, not if missing."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    return os.walk(base, onerror=refuse)


def _depth(path: str, base: str) -> int:
    return path.count("/") - base.count("/")


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _sorted(names: Iterator[str] | list[str]) -> tuple[str, ...]:
    """In order, each as a text: in a name that is no UTF-8 its other bytes are escaped."""
    return tuple(sorted(os.fsencode(name).decode(errors="backslashreplace") for name in names))
