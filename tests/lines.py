"""Counts executed lines: what a call costs, without a clock.

A walk over all instances, networks or messages of a listing adds at least one line for each.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PROJECT = tuple(f"{ROOT / each}/" for each in ("handlers", "schemas", "worker", "tests"))


class Lines:
    """Counts the lines of this project that a thread executes, each iteration and call within
    one included. Not the event loop's: how often it turns depends on the journal's thread."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counted(self) -> Generator[None]:
        """Of the calling thread, inside the `with`."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(before)

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        """For `sys.settrace`."""
        if not frame.f_code.co_filename.startswith(PROJECT):
            return None
        self.count += 1
        return self.trace
