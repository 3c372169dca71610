"""A clock that only tests move."""

from dataclasses import dataclass

START_MS = 1_700_000_000_000


@dataclass
class FakeClock:
    """Wall and monotonic time; the monotonic one begins at 0."""

    at_ms: int = START_MS

    def now_ms(self) -> int:
        return self.at_ms

    def monotonic_s(self) -> float:
        return (self.at_ms - START_MS) / 1000

    def advance(self, ms: int) -> None:
        self.at_ms += ms
