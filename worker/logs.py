"""Structured logs: one JSON object per line on stdout, `noun.verb_past` events, facts in fields.

docs/operations.md lists all events. No secrets, no guest data, no whole envelopes: callers log
names and numbers; in addition, the values of fields with sensitive names are replaced.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, Final, cast

import structlog

from handlers.errors import Failure
from worker.log_writer import LogWriter

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_HIDDEN = frozenset({"secrets", "secret", "creds", "password", "token", "payload", "envelope"})
_TEXT_MAX = 2000
BURST: Final = 100
PER_SECOND: Final = 5.0
LIMITED: Final = frozenset({"warning", "error", "critical"})

log = structlog.get_logger()
_counts: list[Callable[[], int]] = []
_queues: list[LogWriter] = []


def dropped() -> int:
    """Lines of this process that were not written, or suppressed because they repeat."""
    return sum(count() for count in _counts)


def waiting() -> int:
    """Lines of this process that wait to be written."""
    return sum(each.waiting for each in _queues)


def configure(level: str, *, stream: str = "stdout", writer: LogWriter | None = None) -> None:
    """Send all logs of this process at `level` and above to `stdout` or `stderr`.

    With a `writer`, as in the worker, logging never raises, never blocks, and repeated lines are
    limited; what Python's own `logging` reports (asyncio, nats-py) goes the same way.
    """

    def current(*_: object) -> structlog.WriteLogger | LogWriter:
        return writer or structlog.WriteLogger(sys.stderr if stream == "stderr" else sys.stdout)

    limit = [] if writer is None else [LogLimit()]
    if writer is not None:
        logging.basicConfig(level=logging.WARNING, handlers=[_OfLibraries()], force=True)
        _queues[:] = [writer]
        _counts[:] = [
            lambda: writer.dropped,
            *(partial(getattr, each, "suppressed") for each in limit),
        ]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            *limit,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.format_exc_info,
            _hide,
            structlog.processors.JSONRenderer(serializer=_dump),
        ],
        logger_factory=current,
        cache_logger_on_first_use=False,
    )
    set_level(level)


def set_level(level: str) -> None:
    """Change the level alone; where the lines go, and what was dropped, stays."""
    known = structlog.get_config()
    structlog.configure(
        processors=known["processors"],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=known["logger_factory"],
        cache_logger_on_first_use=False,
    )


class LogLimit:
    """A structlog processor that limits repeated warnings and errors: a loop must not fill the log.

    Per event a burst and then a rate; what is left out is counted, and the next line of that event
    that passes says how many. Lines of level info and below are one per command, and always pass.
    """

    def __init__(self, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._buckets: dict[object, tuple[float, float]] = {}  # tokens, as of when
        self._left_out: dict[object, int] = {}
        self._suppressed = 0

    @property
    def suppressed(self) -> int:
        """All that were left out, part of `hostd_log_dropped_total`."""
        return self._suppressed

    def __call__(
        self, _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        if event.get("level") not in LIMITED:
            return event
        name, now_s = event.get("event"), self._monotonic_s()
        tokens, at_s = self._buckets.get(name, (float(BURST), now_s))
        tokens = min(float(BURST), tokens + (now_s - at_s) * PER_SECOND)
        if tokens < 1:
            self._buckets[name] = tokens, now_s
            self._left_out[name] = self._left_out.get(name, 0) + 1
            self._suppressed += 1
            raise structlog.DropEvent
        self._buckets[name] = tokens - 1, now_s
        if left_out := self._left_out.pop(name, 0):
            event["suppressed"] = left_out
        return event


def facts_of(error: Exception) -> dict[str, Any]:
    """Fields for the log: of an expected failure its text, of a bug the traceback too."""
    return {"error": repr(error), "exc_info": not isinstance(error, Failure | OSError)}


def _hide(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for name in _HIDDEN.intersection(event):
        event[name] = "(hidden)"
    return event


def _dump(event: object, **_options: object) -> str:
    try:
        return _JSON.encode(event)
    except Exception as error:  # noqa: BLE001 - logging never raises
        # A value that no JSON has (a cycle, too deep, a key that is no text) loses its fields only.
        known = {name: str(cast("dict[str, Any]", event).get(name)) for name in ("event", "at")}
        return json.dumps(known | {"unprintable": type(error).__name__})


class _OfLibraries(logging.Handler):
    """Records of Python's `logging`, which would go to stderr and could block there."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning(
            "library.logged", logger=record.name, text=record.getMessage(), exc_info=record.exc_info
        )

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name of logging
        """Nothing: the default writes to stderr."""


def _plain(value: object) -> str:
    """Errors as `Class: text`, other values as their text; bounded, since it may be untrusted."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
    return text[:_TEXT_MAX]


_JSON: Final = json.JSONEncoder(default=_plain, ensure_ascii=False, separators=(",", ":"))
