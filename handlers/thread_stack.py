"""Where a thread of this process is: its Python stack, for a log line about one that hangs."""

import sys
import threading
import traceback
from typing import Final

FRAMES: Final = 12


def stack_of(thread: threading.Thread) -> str:
    """Its innermost frames, outermost first, e.g. `writer.py:230 _run > ...`; no values.

    Empty if the thread has not begun or has ended.
    """
    # Underscored, but documented: it has no other name.
    frames_now = sys._current_frames()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    frame = frames_now.get(thread.ident or 0)
    if frame is None or not thread.is_alive():
        return ""
    frames = traceback.extract_stack(frame)[-FRAMES:]
    return " > ".join(
        f"{each.filename.rpartition('/')[2]}:{each.lineno} {each.name}" for each in frames
    )
