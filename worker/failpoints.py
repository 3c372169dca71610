"""Failpoints for crash tests: stop one command at a named point. Off in production.

With `HOSTD_FAILPOINT=after:tap` and `HOSTD_FAILPOINT_FILE=/path` in the environment, the command
that reaches that point writes its name to the file and then waits forever; the test that watches
the file can send SIGKILL. Points are those of `handlers/steps.py`: `before:<step>` and
`after:<step>`, where a step is named after its mechanism.
"""

import asyncio
import os
from collections.abc import Mapping

from handlers.steps import Failpoint, no_failpoint

POINT, FILE = "HOSTD_FAILPOINT", "HOSTD_FAILPOINT_FILE"


def failpoint(environment: Mapping[str, str]) -> Failpoint:
    """The hook for `Steps`; does nothing unless both variables are set."""
    wanted, path = environment.get(POINT), environment.get(FILE)
    if not wanted or not path:
        return no_failpoint

    def write(path: str, moment: str) -> None:
        with open(f"{path}.tmp", "w", encoding="ascii") as file:
            file.write(moment)
        os.rename(f"{path}.tmp", path)

    async def stop(moment: str) -> None:
        if moment != wanted:
            return
        write(path, moment)
        await asyncio.Event().wait()

    return stop
