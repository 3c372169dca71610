"""What hostd owns on this host, counted from the kernel and the file systems, not the journal.

Ours is what carries our mark: a link by its alias, an nftables element by its set, a cgroup by its
path, a jail by its id, a process by the jail or the cgroup it is in. So what another tool made is
never counted, and what hostd forgot is. Reads only; what vanishes meanwhile is not there.

Not counted: zombies, kept volumes, launch logs, tombstones, hostd's own tables without tenants.
"""

import asyncio
import os
import re
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec

from handlers.host.linux.kernel_thread import stay
from handlers.host.net.host_network import open_network_mechanisms
from handlers.host.net.ruleset import CARRIED
from handlers.host.snapshot.manifest import CONSUMED, MANIFEST, MEMORY
from handlers.host.vmm.cgroups import CgroupTree
from handlers.host.vmm.processes import FileIdentity, read_cgroup, read_stat
from schemas import naming
from schemas.settings import NetworkSettings, Settings

DRIVE = ".ext4"
# How the parts of hostd name what they write before its rename.
HALF_OF_OURS = (".part", ".tmp")
HALF_BESIDE_AGENTDS = re.compile(r"\..+\.hostd")


class Inventory(msgspec.Struct, frozen=True):
    """Names of all that is ours, by kind, sorted."""

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

    @property
    def counts(self) -> dict[str, int]:
        """How many, by kind; every kind is there."""
        return {kind: len(getattr(self, kind)) for kind in self.__struct_fields__}


def take(settings: Settings, *, enter: Callable[[], None] = stay) -> Inventory:
    """Look at the whole host. Blocks; to be called from a thread where a loop runs.

    Args:
        settings: say where hostd's directories and cgroups are.
        enter: enters the network namespace to look at; by default the caller's.

    Raises:
        Failure: the kernel does not tell, e.g. without CAP_NET_ADMIN.

    Needs: CAP_NET_ADMIN for nftables, CAP_SYS_PTRACE for processes, CAP_DAC_READ_SEARCH for files.
    """
    with ThreadPoolExecutor(1) as thread:
        network = thread.submit(asyncio.run, _network(settings.network, enter))
        jails = _jails(settings)
        roots = [f"{settings.jail_base}/firecracker/{jail}/root" for jail in jails]
        cgroups = _cgroups(settings)
        snapshots, half = _snapshots(f"{settings.paths.state}/snapshots")
        bridges, taps, nft = network.result()
    return Inventory(
        processes=_processes(roots, settings.limits.cgroup),
        taps=taps,
        bridges=bridges,
        cgroups=cgroups,
        jails=jails,
        nft=nft,
        sockets=_sorted(_in_jails(roots, lambda name, mode: stat.S_ISSOCK(mode))),
        disks=_sorted(
            _in_jails(roots, lambda name, mode: stat.S_ISREG(mode) and name.endswith(DRIVE))
        ),
        snapshots=snapshots,
        artifacts=_sorted(
            path for path in _at_depth(f"{settings.paths.state}/artifacts", 3) if not _half(path)
        ),
        temp=_sorted([*half, *_temp(settings)]),
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
    """Live processes whose root or executable is in a jail of ours, or that are in our cgroup.

    Not the kernel's own thread that KVM puts into the cgroup for each VM (kvm-nx-lpage-recovery).
    By device and inode: a jailed process has a mount namespace of its own, in which its root is
    `/` and its executable `/firecracker`. Source: proc_pid_root(5), proc_pid_exe(5).
    """
    ours = {
        FileIdentity(found.st_dev, found.st_ino)
        for root in roots
        for path in (root, f"{root}/firecracker")
        if (found := _lstat(path))
    }
    return tuple(
        name
        for name in sorted(os.listdir("/proc"), key=lambda name: (len(name), name))
        if name.isdecimal() and _is_ours(int(name), ours, cgroup)
    )


def _is_ours(pid: int, files: set[FileIdentity], cgroup: str) -> bool:
    found = read_stat(pid)
    if found is None or found[0] in "ZX":
        return False
    in_our_cgroup = f"{read_cgroup(pid)}/".startswith(f"{cgroup}/")
    try:
        if in_our_cgroup:
            return FileIdentity.of(f"/proc/{pid}/exe") is not None  # a kernel thread has none
        return any(FileIdentity.of(f"/proc/{pid}/{link}") in files for link in ("root", "exe"))
    except PermissionError:  # another user namespace's, or a guarded one: no VMM of ours
        return in_our_cgroup


def _cgroups(settings: Settings) -> tuple[str, ...]:
    """The leaves below `[limits] cgroup`; a tenant's directory that is empty is one."""
    tree = CgroupTree.of(settings)
    base = tree.path(tree.base)
    return _sorted(
        os.path.relpath(path, tree.mount)
        for path, directories, _ in _walk(base)
        if not directories and path != base
    )


# -- files -----------------------------------------------------------------------------------------


def _jails(settings: Settings) -> tuple[str, ...]:
    """Ids of the jails that hostd named, whole or not; other tools name theirs differently."""
    found = _names(f"{settings.jail_base}/firecracker")
    return _sorted(name for name in found if naming.JAIL_ID_PATTERN.fullmatch(name))


def _in_jails(roots: list[str], wanted: Callable[[str, int], bool]) -> Iterator[str]:
    """Files in a jail, at most one directory deep: what else a VMM may make is its own."""
    for root in roots:
        for path, directories, names in _walk(root):
            if path != root:
                directories.clear()
            for name in names:
                found = _lstat(f"{path}/{name}")
                if found and wanted(name, found.st_mode):
                    yield os.path.relpath(f"{path}/{name}", os.path.dirname(os.path.dirname(root)))


def _snapshots(base: str) -> tuple[tuple[str, ...], list[str]]:
    """`<t>/<p>/<i>/<n>`: those with a manifest, and the paths of those that nothing needs."""
    whole: list[str] = []
    half: list[str] = []
    for path in _at_depth(base, 4):
        sealed = os.path.exists(f"{base}/{path}/{MANIFEST}") and not _half(path)
        if sealed:
            whole.append(path)
        elif not _woken(f"{base}/{path}"):
            half.append(f"{base}/{path}")
    return _sorted(whole), half


def _woken(directory: str) -> bool:
    """Whether it is the memory of a live VM, which was woken from it: its jail links the file."""
    memory = _lstat(f"{directory}/{MEMORY}")
    return memory is not None and memory.st_nlink > 1 and os.path.exists(f"{directory}/{CONSUMED}")


def _temp(settings: Settings) -> Iterator[str]:
    """Paths of what was to be renamed into place and was not."""
    state, data = settings.paths.state, settings.paths.data
    for base in (state, *(f"{state}/{kind}" for kind in ("artifacts", "snapshots", "logs"))):
        for path, directories, names in _walk(base):
            if base == state:
                directories.clear()
            elif base.endswith("/snapshots") and _depth(path, base) >= 3:
                directories.clear()  # a snapshot's directory is whole or half, as one
            yield from (f"{path}/{name}" for name in names if _half(name))
            yield from (f"{path}/{name}" for name in directories if _half(name))
            directories[:] = [name for name in directories if not _half(name)]
    for path, _, names in _walk(f"{data}/tenants"):
        yield from (f"{path}/{name}" for name in names if HALF_BESIDE_AGENTDS.fullmatch(name))


def _half(path: str) -> bool:
    name = os.path.basename(path)
    return name.endswith(HALF_OF_OURS) or name.startswith(".")


def _at_depth(base: str, depth: int) -> Iterator[str]:
    """Directories that many levels below, relative to the base; no link is followed."""
    for path, directories, _ in _walk(base):
        if _depth(path, base) == depth - 1:
            yield from (os.path.relpath(f"{path}/{name}", base) for name in directories)
            directories.clear()


def _walk(base: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, following no link; what may not be read is an error, what is gone is not."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    return os.walk(base, onerror=refuse)


def _depth(path: str, base: str) -> int:
    return path.count("/") - base.count("/")


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _sorted(names: Iterator[str] | list[str]) -> tuple[str, ...]:
    return tuple(sorted(names))
