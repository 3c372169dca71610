"""Progress of the demo: one line per step, and the rows of the summary."""

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Prints each step while it runs and collects the rows of the summary."""

    write: Callable[[str, bool], None]  # a text, and whether it ends the line
    started: float = field(default_factory=time.perf_counter)
    rows: list[tuple[str, float | None, str]] = field(
        default_factory=list[tuple[str, float | None, str]]
    )

    stopped_by: int | None = None

    def line(self, text: str) -> None:
        self.write(text, True)

    def stop(self, signal_number: int) -> None:
        """Start no further step: a library's wait may swallow a cancellation."""
        self.stopped_by = signal_number

    @contextmanager
    def step(self, what: str) -> Generator[list[str]]:
        """Time the body, which appends the facts to print. The name is printed first."""
        if self.stopped_by is not None:
            raise asyncio.CancelledError
        self.write(f"  {what:<20} ", False)
        began = time.perf_counter()
        facts: list[str] = []
        try:
            yield facts
        except BaseException as error:
            self.write("failed" if isinstance(error, Exception) else "interrupted", True)
            raise
        self._finish(what, time.perf_counter() - began, ", ".join(facts))

    def note(self, what: str, facts: str) -> None:
        """A row without a duration."""
        self.write(f"  {what:<20} ", False)
        self._finish(what, None, facts)

    def _finish(self, what: str, seconds: float | None, facts: str) -> None:
        self.rows.append((what, seconds, facts))
        self.write(f"{'' if seconds is None else duration(seconds):>9}   {facts}", True)

    def total_s(self) -> float:
        return time.perf_counter() - self.started


def duration(seconds: float) -> str:
    """Milliseconds below one second, seconds from there on."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


class DemoFailed(Exception):
    """The demo observed something other than what it is meant to show."""
