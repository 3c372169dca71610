"""Clean-up that cancellation cannot cut short."""

import asyncio
from collections.abc import Coroutine


async def run_shielded(work: Coroutine[object, object, object]) -> None:
    """Await `work` to its end, then let a cancellation that came meanwhile take effect."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
        except Exception:  # noqa: BLE001, S110 - raised below, by the task itself
            pass
    task.result()
    if cancelled:
        raise asyncio.CancelledError
