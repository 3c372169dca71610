"""The failures of commands: the class says who must act. Only the dispatcher makes one a reply."""

import errno
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from schemas.codes import Code


class Failure(Exception):
    """A command that did not succeed.

    Args:
        message: one sentence with the names needed to act; ends up in the reply.
        path: the invalid field, e.g. `$.request.SetupNetwork.net.gateway_ip`, or a file.
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
        """Mark the failure as final: the command is not retried under this id. Returns it."""
        self.final = True
        return self


class Unavailable(Failure):
    """Busy or not ready yet: retried here with backoff, then by the sender with a new id."""

    code = Code.UNAVAILABLE
    retryable = True


class Abandoned(Unavailable):
    """A system call did not return in its time: its effect may still happen, until it returns.

    Args:
        pending: whether it has not returned yet.
    """

    def __init__(self, message: str, pending: Callable[[], bool]) -> None:
        super().__init__(message)
        self.pending = pending


class Quarantined(Unavailable):
    """This host launches nothing until one launch succeeds or an operator says so: elsewhere."""

    act = "scheduler"


class Exhausted(Failure):
    """Quota, memory, disk, address or uid used up: elsewhere, or later."""

    code = Code.EXHAUSTED
    retryable = True
    act = "scheduler"


class Invalid(Failure):
    """Does not decode or breaks a rule; never retried unchanged."""

    code = Code.INVALID


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
    """A later command for the same instance takes precedence."""

    code = Code.SUPERSEDED


class Draining(Failure):
    """The host takes no new VMs; nothing was started: elsewhere."""

    code = Code.DRAINING
    retryable = True
    act = "scheduler"


class HostFault(Failure):
    """EACCES, EPERM, EIO, a missing binary, a refused snapshot, anything unlisted: page someone."""

    code = Code.HOST_FAULT
    act = "operator"


class RecordFault(HostFault):
    """A fact could not be recorded: what is being undone waits until it can."""


# The one table from errno to who must act. A number that is not in it is a fault of the host.
FAILURE_OF_ERRNO: Final[Mapping[int, type[Failure]]] = {
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
    errno.ENFILE: Exhausted,
}


def failure_class(number: int | None) -> type[Failure]:
    """The class for an errno; HostFault for None and what is not listed (EACCES, EPERM, EIO)."""
    return HostFault if number is None else FAILURE_OF_ERRNO.get(number, HostFault)


def errno_name(number: int) -> str:
    """The symbolic name, as `detail.errno` has it: `ENOSPC`; the digits if there is no name."""
    return errno.errorcode.get(number, str(number))


def of_os_error(error: OSError, attempted: str | None = None) -> Failure:
    """The failure for an error of the kernel, with its class by errno.

    Args:
        attempted: what failed, with names, e.g. `cannot create cgroup a/b`; without it the message
            names the files of the error.
    """
    number = error.errno
    if number:
        reason, detail = os.strerror(number), {"errno": errno_name(number)}
    elif isinstance(error, TimeoutError):
        return Unavailable(f"{attempted}: timed out" if attempted else "a step timed out")
    else:
        reason, detail = type(error).__name__, {}
    if attempted:
        message = f"{attempted}: {reason}"
    else:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        message = f"{reason}: {' -> '.join(names)}" if names else reason
    return failure_class(number)(message, detail=detail)
