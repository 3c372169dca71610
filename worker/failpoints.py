"""Failpoints for crash tests: stop one command at a named point. Off in production.

With `HOSTD_FAILPOINT=after:tap` and `HOSTD_FAILPOINT_FILE=/path` in the environment, the command
that reaches that point writes its name to the file and then waits forever; the test that watches
the file can send SIGKILL. With `HOSTD_FAILPOINT_ARM=/path`, too, only while that file exists. With
`HOSTD_FAILPOINT=all` nothing stops: each point that is reached is a line of the file.

Points are those of `handlers/steps.py`, `intent:<step>`, `before:<step>` and `after:<step>`, where
a step is named after its mechanism; and of each command `before:outcome`, in `worker/dispatch.py`,
`before:reply`, i.e. after the outcome is committed, and `after:reply`, when the reply is in its
stream and still in the journal, in `worker/outbox.py`.
"""

import asyncio
import os
from collections.abc import Mapping

from handlers.steps import Failpoint, no_failpoint

POINT, FILE, ARM = "HOSTD_FAILPOINT", "HOSTD_FAILPOINT_FILE", "HOSTD_FAILPOINT_ARM"
ALL = "all"


def failpoint(environment: Mapping[str, str]) -> Failpoint:
    """The hook for `Steps`; does nothing unless point and file are set."""
    wanted, path, arm = environment.get(POINT), environment.get(FILE), environment.get(ARM)
    if not wanted or not path:
        return no_failpoint

    def write(path: str, moment: str) -> None:
        with open(f"{path}.tmp", "w", encoding="ascii") as file:
            file.write(moment)
        os.rename(f"{path}.tmp", path)

    def add(path: str, moment: str) -> None:
        with open(path, "a", encoding="ascii") as file:
            file.write(f"{moment}\n")

    async def stop(moment: str) -> None:
        if wanted == ALL:
            add(path, moment)
        elif moment == wanted and (arm is None or os.path.exists(arm)):
            write(path, moment)
            await asyncio.Event().wait()

    return stop
