"""The failure vocabulary: the class says who must act. Only the dispatcher makes it a reply."""

import errno
import os
from typing import Any, ClassVar, Final

from schemas.codes import Code


class Failure(Exception):
    """A command that did not succeed.

    Args:
        message: one sentence with the names needed to act; ends up in the reply.
        path: the field at fault, e.g. `$.request.SetupNetwork.net.gateway_ip`, or a file.
        detail: facts for the reply's `detail`; no guest data, no secrets.
    """

    code: ClassVar[Code]
    retryable: ClassVar[bool] = False
    act: ClassVar[str] = "sender"

    def __init__(
        self, message: str, *, path: str | None = None, detail: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.detail: dict[str, Any] = detail or {}
        self.left_behind: tuple[str, ...] = ()
        self.final = False

    def not_retryable(self) -> "Failure":
        """The same failure, not to be tried again under this command id."""
        self.final = True
        return self


class Unavailable(Failure):
    """Busy or not ready yet; tried again here with backoff, then by the sender with a new id."""

    code = Code.UNAVAILABLE
    retryable = True


class Exhausted(Failure):
    """Quota, memory, disk, address or uid used up: elsewhere, or later."""

    code = Code.EXHAUSTED
    retryable = True
    act = "scheduler"


class Invalid(Failure):
    """Does not decode or breaks a rule; never retried as it is."""

    code = Code.INVALID


class Unsupported(Invalid):
    """Understood as a command, but not by this version of hostd."""

    code = Code.UNSUPPORTED


class Conflict(Failure):
    """Exists with another spec, wrong state, still in use: read the state first."""

    code = Code.CONFLICT


class NotFound(Failure):
    """Names what this host does not have."""

    code = Code.NOT_FOUND


class Expired(Failure):
    """The deadline passed before it could be done."""

    code = Code.EXPIRED


class Superseded(Failure):
    """A later command for the same instance won."""

    code = Code.SUPERSEDED


class Draining(Failure):
    """The host takes no new VMs; nothing was started."""

    code = Code.DRAINING
    retryable = True
    act = "scheduler"


class HostFault(Failure):
    """EACCES, EPERM, EIO, a missing binary, a refused snapshot, anything unlisted: page someone."""

    code = Code.HOST_FAULT
    act = "operator"


_OF_ERRNO: Final[dict[int, type[Failure]]] = {
    errno.EAGAIN: Unavailable,
    errno.EBUSY: Unavailable,
    errno.EINTR: Unavailable,
    errno.ENOBUFS: Unavailable,
    errno.ETIMEDOUT: Unavailable,
    errno.ECONNREFUSED: Unavailable,  # the API socket of a VMM that is not ready
    errno.ENOMEM: Exhausted,
    errno.ENOSPC: Exhausted,
    errno.EDQUOT: Exhausted,
    errno.EMFILE: Exhausted,
}


def of_os_error(error: OSError) -> Failure:
    """Who must act on what the kernel said; unlisted numbers (EACCES, EPERM, EIO) page someone."""
    if isinstance(error, TimeoutError):
        return Unavailable("a step did not end in time")
    number = error.errno or 0
    what = os.strerror(number) if number else type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    message = f"{what}: {' -> '.join(names)}" if names else what
    detail = {"errno": errno.errorcode.get(number, str(number))}
    return _OF_ERRNO.get(number, HostFault)(message, detail=detail)
