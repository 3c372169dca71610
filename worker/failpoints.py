"""A place to stop a worker at a named moment, for crash tests: off unless the environment asks.

With `HOSTD_TRACE_STOP=after:tap` and `HOSTD_TRACE_FILE=/path` in the environment, the command
that reaches that moment writes it to the file and waits there for ever; whoever watches the file
may then send SIGKILL. Moments are those of `handlers/steps.py`: `before:<step>`, `after:<step>`.
"""

import asyncio
import os
from collections.abc import Mapping

from handlers.steps import Traced, no_trace

STOP_AT, TELL = "HOSTD_TRACE_STOP", "HOSTD_TRACE_FILE"


def tracer(environment: Mapping[str, str]) -> Traced:
    """The hook for `Steps`; does nothing unless both variables are set."""
    stop_at, path = environment.get(STOP_AT), environment.get(TELL)
    if not stop_at or not path:
        return no_trace

    def _tell(path: str, moment: str) -> None:
        with open(f"{path}.tmp", "w", encoding="ascii") as file:
            file.write(moment)
        os.rename(f"{path}.tmp", path)

    async def stop(moment: str) -> None:
        if moment != stop_at:
            return
        _tell(path, moment)
        await asyncio.Event().wait()

    return stop
