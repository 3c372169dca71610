"""The clocks. Times on the wire and in the journal are Unix milliseconds; durations are measured by
a clock that nobody sets."""

import time


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def boot_ms() -> int:
    """Milliseconds since the host was booted, its suspends included. Source: CLOCK_BOOTTIME."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
