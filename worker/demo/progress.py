"""How the demo tells what it does: a line for each step, and a summary."""

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Story:
    """What happened, told while it happens and summed up at the end."""

    say: Callable[[str, bool], None]  # a text, and whether the line ends with it
    started: float = field(default_factory=time.perf_counter)
    rows: list[tuple[str, float | None, str]] = field(
        default_factory=list[tuple[str, float | None, str]]
    )

    stopped_by: int | None = None

    def line(self, text: str) -> None:
        self.say(text, True)

    def stop(self, signal_number: int) -> None:
        """Begin no further step: a cancellation alone may be lost in a library's wait."""
        self.stopped_by = signal_number

    @contextmanager
    def step(self, what: str) -> Generator[list[str]]:
        """Time the body; it appends the facts that are told. The name shows while it runs."""
        if self.stopped_by is not None:
            raise asyncio.CancelledError
        self.say(f"  {what:<20} ", False)
        began = time.perf_counter()
        facts: list[str] = []
        try:
            yield facts
        except BaseException as error:
            self.say("failed" if isinstance(error, Exception) else "interrupted", True)
            raise
        self._tell(what, time.perf_counter() - began, ", ".join(facts))

    def tell(self, what: str, facts: str) -> None:
        """Something seen, that took no time of its own."""
        self.say(f"  {what:<20} ", False)
        self._tell(what, None, facts)

    def _tell(self, what: str, seconds: float | None, facts: str) -> None:
        self.rows.append((what, seconds, facts))
        self.say(f"{'' if seconds is None else duration(seconds):>9}   {facts}", True)

    def total_s(self) -> float:
        return time.perf_counter() - self.started


def duration(seconds: float) -> str:
    """For people: milliseconds, or seconds from one on."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


class DemoFailed(Exception):
    """The demo did not see what it promises to show."""
