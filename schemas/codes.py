"""The result codes of the wire, and the exit code of the CLI for each."""

from enum import StrEnum

__all__ = [
    "EXIT_CODES",
    "EXIT_NO_ANSWER",
    "Code",
]


class Code(StrEnum):
    """How a command ended; the class says who must act (see `handlers/errors.py`)."""

    OK = "ok"
    INVALID = "invalid"
    UNSUPPORTED = "unsupported"
    CONFLICT = "conflict"
    NOT_FOUND = "not_found"
    EXHAUSTED = "exhausted"
    UNAVAILABLE = "unavailable"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    DRAINING = "draining"
    HOST_FAULT = "host_fault"
    INTERNAL = "internal"


EXIT_NO_ANSWER = 30
EXIT_CODES: dict[Code, int] = {
    Code.OK: 0,
    Code.INVALID: 10,
    Code.UNSUPPORTED: 11,
    Code.CONFLICT: 12,
    Code.NOT_FOUND: 13,
    Code.EXHAUSTED: 14,
    Code.UNAVAILABLE: 15,
    Code.EXPIRED: 16,
    Code.SUPERSEDED: 17,
    Code.DRAINING: 18,
    Code.HOST_FAULT: 20,
    Code.INTERNAL: 21,
}
