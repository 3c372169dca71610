"""Where a worker is killed: every point of every command, found by running the commands.

The list is nobody's to keep: each command of `handlers/registry.py` runs once, undisturbed, on the
host in memory, and what its failpoints report is the list. A real worker's undisturbed run is
compared with it (`tests/crash/test_kill_points.py`).
"""

import asyncio
import fcntl
import functools
import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from handlers.registry import HANDLERS
from schemas.codes import Code
from schemas.requests import Request, SetupNetwork, TeardownNetwork, TenantNet
from tests.constants import DESTROY, NET, REF, SLEEP, START, STOP, WAKE
from tests.fakes.host import seeded
from tests.fakes.memory_worker import memory_worker
from tests.side_by_side import POINTS, lock_of

SEED: Final = "HOSTD_CRASH_SEED"
RUN: Final = "PYTEST_XDIST_TESTRUNUID"
ALL: Final = "all"  # the seed with which every point is tried
SLICE: Final = 24
# Of each command, beyond its steps: see worker/failpoints.py.
ENDS: Final = ("before:outcome", "before:reply", "after:reply")
KINDS: Final = tuple(request.__name__ for request in HANDLERS)
# What has to run before each command.
BEFORE: Final[dict[str, tuple[str, ...]]] = {
    "SetupNetwork": (),
    "StartInstance": ("SetupNetwork",),
    "SleepInstance": ("SetupNetwork", "StartInstance"),
    "WakeInstance": ("SetupNetwork", "StartInstance", "SleepInstance"),
    "StopInstance": ("SetupNetwork", "StartInstance"),
    "DestroyInstance": ("SetupNetwork", "StartInstance"),
    "TeardownNetwork": ("SetupNetwork",),
}


def requests(net: TenantNet = NET) -> dict[str, Request]:
    """The commands that are killed, by kind."""
    up, down = SetupNetwork(REF.tenant_id, net), TeardownNetwork(REF.tenant_id, net)
    return {each.kind: each for each in (up, START, SLEEP, WAKE, STOP, DESTROY, down)}


def points(moments: Sequence[str]) -> list[str]:
    """The points to kill at, of what a run reported: each once, and of rows that are committed
    together the first."""
    found: list[str] = []
    last = ""
    for moment in dict.fromkeys(moments):
        if not (moment.startswith("intent:") and last.startswith("intent:")):
            found.append(moment)
        last = moment
    return found


async def in_memory(kind: str, directory: Path) -> list[str]:
    """The moments of an undisturbed run on the host in memory, which has no outbox."""
    seen: list[str] = []

    async def note(moment: str) -> None:
        seen.append(moment)

    async with memory_worker(directory / kind, seeded(), failpoint=note) as worker:
        for earlier in BEFORE[kind]:
            assert (await worker.run(requests()[earlier])).code is Code.OK
        seen.clear()
        assert (await worker.run(requests()[kind])).code is Code.OK
    return [*seen, *(end for end in ENDS if end not in seen)]


def every_point() -> list[tuple[str, str]]:
    """Kind and point, for all commands of the registry."""

    async def all_of_them() -> list[tuple[str, str]]:
        with tempfile.TemporaryDirectory(prefix="hostd-points-") as directory:
            return [
                (kind, point)
                for kind in KINDS
                for point in points(await in_memory(kind, Path(directory)))
            ]

    return asyncio.run(all_of_them())


def chosen(all_points: Sequence[tuple[str, str]], seed: str) -> list[tuple[str, str]]:
    """With the seed `all` every point, else a slice that any run with this seed has, in order: at
    least two points of each command."""
    if seed == ALL:
        return list(all_points)
    dice = random.Random(seed)
    by_name = sorted(all_points)  # steps that run at once report their moments in any order
    found = {
        each
        for kind in dict.fromkeys(kind for kind, _ in by_name)
        for each in dice.sample([each for each in by_name if each[0] == kind], 2)
    }
    rest = [each for each in by_name if each not in found]
    found |= set(dice.sample(rest, max(0, min(SLICE - len(found), len(rest)))))
    return [each for each in all_points if each in found]


def of_this_run(all_points: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """What this run's seed chooses. Processes of a split run (`-n 2`) must collect the same tests,
    and no two undisturbed runs report just the same: the first that asks makes the list for all."""
    if not (run := os.environ.get(RUN)):
        return chosen(all_points, seed())
    with open(lock_of(run) + POINTS, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (text := file.read()):
            text = json.dumps(chosen(all_points, seed()))
            file.write(text)
        return [(kind, point) for kind, point in json.loads(text)]


@functools.cache
def seed() -> str:
    """The caller's, or one of this run's own, which it prints (`tests/crash/conftest.py`): the same
    in all processes of a run that is split (`-n 2`).

    No worker inherits the variable: it is not a setting.
    """
    run = os.environ.get(RUN)  # without it, the dice are the machine's
    return os.environ.pop(SEED, None) or str(random.Random(run).randrange(10**6))
