"""Writes log lines to a descriptor without ever raising into or blocking the code that logs.

A side effect must not stop the work. The reader of stdout may go away (EPIPE), its disk may fill
(ENOSPC), or nobody reads the pipe: so lines go through a bounded queue to a thread of their own,
and what does not fit or cannot be written is dropped and counted. The event loop never writes.

A line of the loop wakes the thread some milliseconds later, not at once: the thread would take the
interpreter's lock just when a command's reply is due. Under load one wake-up serves many lines.
"""

import asyncio
import contextlib
import os
import select
import threading
from collections import deque
from typing import Final

QUEUE_LINES: Final = 10_000
QUEUE_BYTES: Final = 4 << 20
CLOSE_S: Final = 1.0
POLL_S: Final = 1.0
WAKE_S: Final = 0.005
URGENT_LINES: Final = QUEUE_LINES // 4


class LogWriter:
    """One thread per descriptor, which belongs to the caller. Thread-safe.

    `dropped` counts lines that were not written, for `hostd_log_dropped_total`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._torn = False  # the last line was cut: the next one begins with a newline
        self._closing = False
        self._waking = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()
        self.dropped = 0

    def msg(self, message: str) -> None:
        """Queue one line, or count it as dropped."""
        line = message.encode("utf-8", "backslashreplace") + b"\n"
        with self._changed:
            full = len(self._lines) >= QUEUE_LINES or self._bytes + len(line) > QUEUE_BYTES
            if full or self._closing:
                self.dropped += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
            if len(self._lines) >= URGENT_LINES:
                self._changed.notify()
            waking, self._waking = self._waking, True
        if not waking:
            self._wake_soon()

    def _wake_soon(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # another thread than the loop's
            self._wake()
        else:
            loop.call_later(WAKE_S, self._wake)

    def _wake(self) -> None:
        with self._changed:
            self._waking = False
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Lines in the queue."""
        return len(self._lines)

    debug = info = warning = error = critical = log = msg

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what is queued, for at most `timeout_s`: nobody may be reading."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    # -- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while (line := self._next()) is not None:
            if not self._write(line):
                with self._changed:
                    self.dropped += 1

    def _next(self) -> bytes | None:
        with self._changed:
            while not self._lines:
                if self._closing:
                    return None
                self._changed.wait(POLL_S)  # the loop that was to wake it may have ended
            line = self._lines.popleft()
            self._bytes -= len(line)
            return line

    def _write(self, line: bytes) -> bool:
        """Whether all of it was written; an error drops this line only."""
        rest = memoryview(b"\n" + line if self._torn else line)
        try:
            while rest:
                try:
                    written = os.write(self._fd, rest)
                except BlockingIOError:  # another process made the shared description so
                    self._wait_writable()
                    continue
                rest = rest[written:]
                self._torn = bool(rest)
        except OSError:
            return False
        return True

    def _wait_writable(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.poll(POLL_S * 1000)


def open_standard_descriptors() -> None:
    """Open /dev/null at 0, 1 and 2 where they are closed, before another file gets that number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
