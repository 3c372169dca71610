"""What the client raises; the class says what happened, `act` who must act.

Catch `HostdError` for all of it, `Refused` for what a worker decided, `NoAnswer` for what is open.
"""

from typing import Final

from schemas.codes import Code
from schemas.envelopes import Reply

__all__ = [
    "BadAnswer",
    "BadRefusal",
    "BadSetting",
    "Conflict",
    "Draining",
    "EventsLost",
    "Exhausted",
    "Expired",
    "HostFault",
    "HostdError",
    "Internal",
    "Invalid",
    "NoAnswer",
    "NoConnection",
    "NoReply",
    "NoWorker",
    "NotFound",
    "NotStored",
    "Refused",
    "Superseded",
    "Unavailable",
    "Unsupported",
]

NO_ANSWER: Final = "no_answer"


class HostdError(Exception):
    """Base of all errors of the client.

    Attributes:
        code: a code of the contract, or `no_answer`.
        message: one sentence with names.
        act: who must act: `sender` (this program), `scheduler` (another host, or later),
            `operator` (page someone).
    """

    code: str = NO_ANSWER
    act: str = "sender"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


# -- nothing was decided ---------------------------------------------------------------------------


class NoAnswer(HostdError):
    """Nobody answered in time, or not as this account may hear it: it is open what happened."""


class NoConnection(NoAnswer):
    """NATS is not reached, or does not take these credentials."""

    act = "operator"


class NoWorker(NoAnswer):
    """No worker of this host runs, or it does not take queries. Commands wait in the stream."""

    act = "operator"


class NotStored(NoAnswer):
    """The stream did not take the command: it will not run. Send it again later.

    So it is of one call of `send`: what an earlier one under the same ID left open may still run.
    """


class NoReply(NoAnswer):
    """No reply within the timeout: the command may still run. Send it again under the same ID.

    Attributes:
        command_id: the ID to send it again with, for its outcome.
    """

    def __init__(self, message: str, command_id: str) -> None:
        super().__init__(message)
        self.command_id = command_id


class EventsLost(NoAnswer):
    """Events between two that arrived did not: subscribe again and read a new snapshot."""


class BadSetting(HostdError):
    """An argument, or a file that one names, cannot be used; nothing was sent."""

    code = Code.INVALID


class BadAnswer(HostdError):
    """What arrived is not what the contract says."""

    code = Code.INTERNAL
    act = "operator"


# -- what a worker decided -------------------------------------------------------------------------


class Refused(HostdError):
    """A command did not succeed, or a query was not answered. Final for this command ID.

    Attributes:
        reply: the whole reply with `steps`, `left_behind` and `detail`; None for a query.
        retryable: whether the same request may succeed under a new ID.
        path: the field or file at fault, if there is one.
    """

    def __init__(self, message: str, reply: Reply | None = None) -> None:
        super().__init__(message)
        self.reply = reply
        self.retryable = reply is not None and reply.retryable
        detail = {} if reply is None else reply.detail
        act, path = detail.get("act"), detail.get("path")
        self.act = act if isinstance(act, str) else type(self).act
        self.path: str | None = path if isinstance(path, str) else None


class Invalid(Refused):
    """A rule is broken, in the request or in a shared file. Never unchanged again."""

    code = Code.INVALID


class Unsupported(Refused):
    """This hostd does not know that; `reply.supported` has the protocols that it speaks."""

    code = Code.UNSUPPORTED


class Conflict(Refused):
    """The host is in another state: read it, decide again."""

    code = Code.CONFLICT


class NotFound(Refused):
    """Names what this host does not have."""

    code = Code.NOT_FOUND


class Exhausted(Refused):
    """A quota, memory, disk or addresses are used up: elsewhere, or later."""

    code = Code.EXHAUSTED
    act = "scheduler"


class Unavailable(Refused):
    """Busy, not ready yet, or the guest did not answer: again, under a new ID."""

    code = Code.UNAVAILABLE


class Expired(Refused):
    """The deadline passed before it was done; what was begun is undone."""

    code = Code.EXPIRED


class Superseded(Refused):
    """A Stop or Destroy of the instance came after it; `reply.detail["by"]` is its ID."""

    code = Code.SUPERSEDED


class Draining(Refused):
    """The host takes no new VMs: elsewhere."""

    code = Code.DRAINING
    act = "scheduler"


class HostFault(Refused):
    """The host is at fault: page someone; the instance may be placed elsewhere."""

    code = Code.HOST_FAULT
    act = "operator"


class Internal(Refused):
    """A bug of hostd: page someone."""

    code = Code.INTERNAL
    act = "operator"


class BadRefusal(Refused):
    """Refused with a code that this client does not know; `code` has it.

    `reply.code` is `internal` in its place.
    """

    def __init__(self, code: str, message: str, reply: Reply | None = None) -> None:
        super().__init__(message, reply)
        self.code = code


REFUSALS: Final[dict[str, type[Refused]]] = {
    Code.INVALID: Invalid,
    Code.UNSUPPORTED: Unsupported,
    Code.CONFLICT: Conflict,
    Code.NOT_FOUND: NotFound,
    Code.EXHAUSTED: Exhausted,
    Code.UNAVAILABLE: Unavailable,
    Code.EXPIRED: Expired,
    Code.SUPERSEDED: Superseded,
    Code.DRAINING: Draining,
    Code.HOST_FAULT: HostFault,
    Code.INTERNAL: Internal,
}
