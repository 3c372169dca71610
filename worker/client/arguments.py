"""What a caller passes, of whatever type, checked before anything is sent."""

from typing import Final, TypeGuard

from schemas.codec import TIME_MAX_MS
from schemas.naming import COMMAND_ID_PATTERN
from worker.client.errors import BadSetting

TIMEOUT_MAX_S: Final = 366 * 86_400.0
COUNT_MAX: Final = (1 << 63) - 1


def check_command_id(command_id: object) -> None:
    """Raises `BadSetting` for what is neither None nor an ID."""
    if command_id is None:
        return
    if not isinstance(command_id, str) or not COMMAND_ID_PATTERN.fullmatch(command_id):
        raise BadSetting(f"command_id: got {_shown(command_id)}, want 1 to 64 of A-Z a-z 0-9 _ -")


def check_deadline(deadline_ms: object) -> None:
    """Raises `BadSetting` for what is neither None nor a time in Unix milliseconds."""
    if deadline_ms is None:
        return
    if not _is_whole(deadline_ms) or not 0 <= deadline_ms <= TIME_MAX_MS:
        raise BadSetting(
            f"deadline_ms: got {_shown(deadline_ms)}, want Unix ms, 0 to {TIME_MAX_MS}"
        )


def check_count(name: str, value: object, least: int) -> None:
    """Raises `BadSetting` unless it is a whole number from `least` to a stream's largest."""
    if not _is_whole(value) or not least <= value <= COUNT_MAX:
        raise BadSetting(f"{name}: got {_shown(value)}, want {least} to {COUNT_MAX}")


def check_timeout(timeout_s: object) -> None:
    """Raises `BadSetting` for what is no time to wait, NaN too."""
    if (
        not isinstance(timeout_s, int | float)
        or isinstance(timeout_s, bool)
        or not 0 < timeout_s <= TIMEOUT_MAX_S
    ):
        raise BadSetting(
            f"timeout_s: got {_shown(timeout_s)}, want more than 0, at most {TIMEOUT_MAX_S:g}"
        )


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return ascii(value)[:80]
