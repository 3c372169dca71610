"""The wall clock. Times on the wire and in the journal are Unix milliseconds."""

import time


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
