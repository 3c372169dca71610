"""Checks before a worker starts: ids of the jails, directories, file systems, programs.

`worker/main.py` calls `prepare_dirs`, takes the host lock and then checks the versions of
Firecracker and the jailer; `hostd run` calls `find_uid_overlap` before all of these.
"""

import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from handlers.errors import HostFault
from handlers.host.facts import file_system
from handlers.host.vmm.cgroups import check_controllers
from schemas.settings import Settings

PASSWD, GROUP, SUBUID, SUBGID = "/etc/passwd", "/etc/group", "/etc/subuid", "/etc/subgid"
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class IdRange:
    """`count` ids from `first` on, which `file` assigns to `owner`."""

    file: str
    owner: str
    first: int
    count: int


def find_uid_overlap(
    base: int, count: int, *, files: tuple[str, ...] = (PASSWD, GROUP, SUBUID, SUBGID)
) -> IdRange | None:
    """The first entry of these files with an id in `base` to `base + count - 1`, or None.

    Local files only: users of a directory service are the operator's to keep apart.

    Source: passwd(5), group(5), subuid(5).
    """
    for file in files:
        for assigned in _read_ids(file):
            if assigned.first < base + count and base < assigned.first + assigned.count:
                return assigned
    return None


def _read_ids(file: str) -> Iterator[IdRange]:
    ranges = file.rpartition("/")[2].startswith("sub")
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                fields = line.rstrip("\n").split(":")
                numbers = fields[1:3] if ranges else fields[2:3]
                if not numbers or not all(number.isdecimal() for number in numbers):
                    continue
                count = int(numbers[1]) if ranges and len(numbers) == 2 else 1
                yield IdRange(file, fields[0], int(numbers[0]), count)
    except FileNotFoundError:
        return


def prepare_dirs(settings: Settings) -> None:
    """Make hostd's own directories, root-only, and check what they and the programs must provide.

    Raises:
        HostFault: a directory is on the wrong file system, or mounted `nodev` or `noexec`, or in
            memory while limits are enforced; a program is missing; a production host enforces no
            limits, or would connect to NATS without TLS or a credential.
    """
    if settings.host.production and not settings.limits.enforce:
        raise HostFault(
            "[limits] enforce = false is for development only: set [host] production = false too, "
            "or enforce limits"
        )
    check_connection(settings)
    check_controllers(settings)
    make_dirs(settings)
    os.chmod(settings.paths.state, 0o700)  # an existing one may be open to other users
    check_dirs(settings)
    if settings.vmm.versions_dir:  # its programs are checked one by one, when they are read
        return
    for key, program in (
        ("firecracker", settings.vmm.firecracker),
        ("jailer", settings.vmm.jailer),
    ):
        if not os.access(program, os.X_OK):
            raise HostFault(f"[vmm] {key}: {program} is missing or not executable")


def make_dirs(settings: Settings) -> None:
    """Make those that are missing."""
    for directory in (settings.paths.state, settings.jail_base, settings.paths.run):
        os.makedirs(directory, mode=0o700, exist_ok=True)
    os.makedirs(settings.paths.data, mode=0o755, exist_ok=True)


def check_dirs(settings: Settings) -> None:
    """Check the directories, which exist: one file system, on a disk, devices and programs allowed.

    Raises:
        HostFault: names the setting and what to do.
    """
    state = os.stat(settings.paths.state).st_dev
    for key, directory in (
        ("[vmm] jail_base", settings.jail_base),
        ("[paths] data", settings.paths.data),
    ):
        if os.stat(directory).st_dev != state:
            raise HostFault(
                f"{key} {directory} is on another file system than [paths] state "
                f"{settings.paths.state}: put both on one, files are hard-linked between them"
            )
    check_on_disk(settings)
    flags = os.statvfs(settings.jail_base).f_flag
    for flag, name in ((os.ST_NODEV, "nodev"), (os.ST_NOEXEC, "noexec")):
        if flags & flag:
            raise HostFault(
                f"[vmm] jail_base {settings.jail_base} is mounted {name}: remount it without {name}"
            )


def check_connection(settings: Settings) -> None:
    """Check that a production host connects to NATS with TLS, except by loopback, and signs in.

    Raises:
        HostFault: names the URL, without its password, and what to set.
    """
    if not settings.host.production:
        return
    encrypted = bool(settings.nats.tls)
    urls = [urlsplit(url.strip()) for url in settings.nats.url.split(",")]
    encrypted = encrypted or any(url.scheme in {"tls", "wss"} for url in urls)
    for url in urls:
        shown = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
        if not encrypted and not is_loopback(url.hostname or ""):
            raise HostFault(
                f"[nats] url {shown} is beyond loopback and without TLS: commands and credentials"
                " could be read and forged on the way; use tls:// or set [nats] tls (or [host]"
                " production = false for development)"
            )
        if not settings.nats.creds and not url.username:
            raise HostFault(
                f"[nats] url {shown} is used without a credential: any local user could command"
                " this host; set [nats] creds (or [host] production = false for development)"
            )


def is_loopback(host: str) -> bool:
    """Whether a name in a URL means this host without asking a name server."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_on_disk(settings: Settings) -> None:
    """Check that `[paths] state` is on a disk.

    What a VMM writes to a tmpfs is charged to its cgroup: a snapshot there ends in an OOM kill.

    Raises:
        HostFault: `[paths] state` is in memory while limits are enforced.
    """
    state = settings.paths.state
    if settings.limits.enforce and file_system(state) in MEMORY_FILE_SYSTEMS:
        raise HostFault(
            f"[paths] state {state} is in memory: a snapshot there would count against the VMM's "
            "own memory limit and be lost at a reboot; put it on a disk"
        )
