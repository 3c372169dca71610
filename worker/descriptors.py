"""The limit of open descriptors of this process, raised at start as far as the system allows."""

import resource
from typing import Final

ENOUGH: Final = 65_536  # more makes programs slow that close every possible descriptor


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one, at most to `ENOUGH`; returns it.

    The default soft limit, 1024, is for programs with select(2); a worker with some hundred VMs,
    each with a pidfd, an API and an agent connection, needs more. The jailer sets the VMM's own.

    Source: getrlimit(2), systemd.exec(5) on LimitNOFILE.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    wanted = max(soft, ENOUGH if unlimited else min(hard, ENOUGH))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
