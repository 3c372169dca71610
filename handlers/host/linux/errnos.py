"""One table from errno to the failure class that says who must act."""

import errno
import os

from handlers.errors import Exhausted, Failure, HostFault, Unavailable

BUSY = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOBUFS, errno.ETIMEDOUT, errno.ECONNREFUSED}
)
USED_UP = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})


def failure_class(number: int | None) -> type[Failure]:
    """The class for an errno; what is in no list is a fault of the host."""
    if number in BUSY:
        return Unavailable
    return Exhausted if number in USED_UP else HostFault


def os_failure(error: OSError, doing: str) -> Failure:
    """A failure that says what was being done, e.g. `cannot make the cgroup a/b: <reason>`."""
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return failure_class(error.errno)(f"{doing}: {reason}", detail={"errno": error.errno})
