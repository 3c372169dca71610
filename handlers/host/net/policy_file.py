"""`[network] policy`: the operator's file of what single tenants reach; read again on a change.

It must belong to root, or to the user that the worker runs as, and nobody else may write it:
agentd, which requests the networks, must not decide what they reach.
"""

import os
import stat

import structlog

from handlers.errors import Failure, HostFault, Invalid
from schemas.decode_error import DecodeError
from schemas.network_policy import POLICY_BYTES, NetworkPolicy, decode_policy

Version = tuple[int, int, int, int]

log = structlog.get_logger()


class PolicyFile:
    """`current` is the policy in effect; of no file, an empty one."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._read: Version | None = None
        self._failed: str | None = None
        self.current = NetworkPolicy()

    @property
    def is_set(self) -> bool:
        """Whether there is a file to read."""
        return bool(self._path)

    def at(self, path: str) -> "PolicyFile":
        """This one, or one not yet read of another path."""
        return self if path == self._path else PolicyFile(path)

    def refresh(self) -> bool:
        """Read the file if it changed; true if `current` is another one. An invalid file is logged
        once, and what was read before stays in effect.

        Raises:
            HostFault, Invalid: the first reading failed: no policy is in effect.
        """
        if not self._path:
            return False
        try:
            version, policy = read_policy(self._path, self._read)
        except Failure as failure:
            if self._read is None:
                raise
            if failure.message != self._failed:
                log.error("network.policy_invalid", path=self._path, reason=failure.message)  # noqa: TRY400
            self._failed = failure.message
            return False
        self._failed = None
        changed = policy is not None and policy != self.current
        if changed and self._read is not None:
            log.info("network.policy_changed", path=self._path)
        self._read = version
        self.current = policy if policy is not None else self.current
        return changed


def read_policy(path: str, known: Version | None) -> tuple[Version, NetworkPolicy | None]:
    """The version of the file and its policy; None if the version is the known one.

    Raises:
        HostFault: it cannot be read, or others may write it.
        Invalid: a field breaks a rule.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            found = os.fstat(file.fileno())
            version = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if not stat.S_ISREG(found.st_mode):
                raise HostFault(f"[network] policy {path} is no regular file", path=path)
            if found.st_uid not in {0, os.geteuid()} or found.st_mode & 0o022:
                raise HostFault(
                    f"[network] policy {path} can be written by others (uid {found.st_uid}, mode "
                    f"{stat.S_IMODE(found.st_mode):o}): run chown root and chmod 644 on it",
                    path=path,
                )
            if version == known:
                return version, None
            text = file.read(POLICY_BYTES + 1).decode()
    except OSError as error:
        raise HostFault(
            f"cannot read [network] policy {path}: {error.strerror}", path=path
        ) from error
    except UnicodeDecodeError as error:
        raise Invalid(f"[network] policy {path} is not UTF-8: {error}", path=path) from error
    try:
        return version, decode_policy(text)
    except DecodeError as error:
        raise Invalid(f"invalid [network] policy {path}: {error}", path=path) from error


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
