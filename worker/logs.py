"""Structured logs: one JSON object per line on stdout, `noun.verb_past` events, facts in fields.

docs/operations.md lists all events. No secrets, no guest data, no whole envelopes: callers log
names and numbers; in addition, the values of fields with sensitive names are replaced.
"""

import json
import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_HIDDEN = frozenset({"secrets", "secret", "creds", "password", "token", "payload", "envelope"})
_TEXT_MAX = 2000


def configure(level: str, *, stream: str = "stdout") -> None:
    """Send all logs of this process at `level` and above to `stdout` or `stderr`."""

    def current(*_: object) -> structlog.WriteLogger:
        return structlog.WriteLogger(sys.stderr if stream == "stderr" else sys.stdout)

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.format_exc_info,
            _hide,
            structlog.processors.JSONRenderer(serializer=_dump),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=current,
        cache_logger_on_first_use=False,
    )


def _hide(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for name in _HIDDEN.intersection(event):
        event[name] = "(hidden)"
    return event


def _dump(event: object, **_options: object) -> str:
    return json.dumps(event, default=_plain, ensure_ascii=False, separators=(",", ":"))


def _plain(value: object) -> str:
    """Errors as `Class: text`, other values as their text; bounded, since it may be untrusted."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
    return text[:_TEXT_MAX]
