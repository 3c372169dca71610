"""What a caller passes, checked before anything is sent."""

from typing import Final

from schemas.codec import TIME_MAX_MS
from schemas.naming import COMMAND_ID_PATTERN
from worker.client.errors import BadSetting

TIMEOUT_MAX_S: Final = 366 * 86_400.0
COUNT_MAX: Final = (1 << 63) - 1


def check_command_id(command_id: str | None) -> None:
    """Raises `BadSetting` for what is neither None nor an ID."""
    if command_id is not None and not COMMAND_ID_PATTERN.fullmatch(command_id):
        raise BadSetting(f"command_id: got {command_id[:80]!a}, want 1 to 64 of A-Z a-z 0-9 _ -")


def check_deadline(deadline_ms: int | None) -> None:
    """Raises `BadSetting` for what is neither None nor a time in Unix milliseconds."""
    if deadline_ms is not None and not 0 <= deadline_ms <= TIME_MAX_MS:
        raise BadSetting(f"deadline_ms: got {deadline_ms}, want Unix ms, 0 to {TIME_MAX_MS}")


def check_count(name: str, value: int, least: int) -> None:
    """Raises `BadSetting` for what is no whole number from `least` to the largest of a stream."""
    if not least <= value <= COUNT_MAX:
        raise BadSetting(f"{name}: got {value}, want {least} to {COUNT_MAX}")


def check_timeout(timeout_s: float) -> None:
    """Raises `BadSetting` for what is no time to wait, NaN too."""
    if not 0 < timeout_s <= TIMEOUT_MAX_S:
        raise BadSetting(f"timeout_s: got {timeout_s}, want more than 0, at most {TIMEOUT_MAX_S:g}")
