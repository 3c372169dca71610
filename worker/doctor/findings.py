"""What a check found: severity, what, why it matters, and the command to run."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import StrEnum

import msgspec
import structlog

from handlers.errors import Failure

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class Severity(StrEnum):
    """`error` and `warning` need an action; `info` explains a state that somebody chose."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong, or worth knowing. `check` names what found it."""

    severity: Severity
    check: str
    what: str
    why: str
    run: str


Checks = Mapping[str, Callable[[], Awaitable[Iterable[Finding]]]]


async def run_checks(checks: Checks) -> Sequence[Finding]:
    """All findings, the worst first. A check that fails is one, and keeps no other from running."""
    found: list[Finding] = []
    for name, check in checks.items():
        try:
            found += await check()
        except (Failure, OSError) as error:
            text = error.message if isinstance(error, Failure) else str(error)
            found.append(_unchecked(name, text))
        except Exception as error:
            log.exception("doctor.check_failed", check=name)
            found.append(_unchecked(name, repr(error)))
    order = list(Severity)
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _unchecked(check: str, text: str) -> Finding:
    return Finding(
        Severity.WARNING,
        check,
        f"could not be checked: {text}",
        "what it would have found is not known",
        "hostd doctor, as root, once the reason is gone",
    )
