"""One thread per kernel interface that blocks: calls run there in order, the loop never waits.

Deleting an interface holds `sendmsg` for 15 to 30 ms (RCU), an nftables transaction for some ms;
neither may run in the event loop, and neither library is safe to share between threads.
"""

from collections.abc import Callable
from typing import Final, TypeVar

from handlers.host.linux.call_threads import CallThreads

CALL_S: Final = 45.0
"""More than any call takes that does not hang: the `nft` program is ended after 30 s."""

S = TypeVar("S")


def no_namespace() -> None:
    """Stay in the network namespace of the process."""


def nothing() -> None:
    """The state of a thread that needs none."""


def kernel_thread(
    kind: str,
    enter: Callable[[], None],
    open: Callable[[], S],  # noqa: A002 - as in a with statement
    close: Callable[[S], None],
    *,
    limit_s: float = CALL_S,
) -> CallThreads[S]:
    """A dedicated thread, with its own view of the network namespace, from the first call on.

    Should a call hang, its replacement opens a state of its own: what the hung one holds, e.g. an
    nftables table that its socket owns, is let go of when it returns.
    """
    return CallThreads(kind, limit_s=limit_s, open=open, close=close, enter=enter)
