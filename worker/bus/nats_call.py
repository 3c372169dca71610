"""Around a call of nats-py: its errors become `BusError`, and no cancellation is lost in it."""

import asyncio
from types import TracebackType
from typing import Final

from nats import errors

from worker.bus.protocol import BusError, Unsendable

UNSENDABLE: Final = (
    errors.MaxPayloadError,
    errors.BadSubjectError,
    errors.BadHeaderError,
    UnicodeError,
)
FAILED: Final = (TimeoutError, OSError, errors.Error)


class NatsCall:
    """Raises `Unsendable` and `BusError` in place of nats-py's errors.

    With `cancellable` also the cancellation that arrived meanwhile: nats-py swallows one while it
    flushes or with an answer. A class, no generator: each command enters it some ten times.
    """

    __slots__ = ("_before", "_subject", "_task")

    def __init__(self, subject: str, *, cancellable: bool = False) -> None:
        self._subject = subject
        self._task = asyncio.current_task() if cancellable else None
        self._before = 0 if self._task is None else self._task.cancelling()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task = self._task
        if task is not None and task.cancelling() > self._before:
            if error is None or isinstance(error, Exception):
                raise asyncio.CancelledError from error
        elif error is None:
            return
        elif isinstance(error, UNSENDABLE):
            raise Unsendable(f"{self._subject!a}: {error_text(error)}") from error
        elif isinstance(error, FAILED):
            raise BusError(f"{self._subject}: {error_text(error)}") from error


def error_text(error: BaseException) -> str:
    """The error's text, or its class if it has none."""
    return str(error) or type(error).__name__
