"""Where a thread of this process is: its Python stack, for dumps and for logs of one that hangs."""

import os
import sys
import threading
from typing import Final

FRAMES: Final = 12


def frames_of(thread: threading.Thread) -> list[str]:
    """Its innermost frames, innermost first, e.g. `writer.py:230 Writer._run`; no values.

    Empty if the thread has not begun or has ended.
    """
    # Underscored, but documented: it has no other name.
    frames = sys._current_frames()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    frame = frames.get(thread.ident or 0) if thread.is_alive() else None
    found: list[str] = []
    while frame is not None and len(found) < FRAMES:
        code = frame.f_code
        found.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_qualname}")
        frame = frame.f_back
    return found


def stack_of(thread: threading.Thread) -> str:
    """As `frames_of`, in one line and outermost first: `... > writer.py:230 Writer._run`."""
    return " > ".join(reversed(frames_of(thread)))
