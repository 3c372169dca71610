"""The soft limit of descriptors is raised to the hard one before anything is opened."""

import sys
from asyncio import create_subprocess_exec, timeout
from asyncio.subprocess import PIPE

PROGRAM = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))
from worker.descriptors import raise_limit
print(raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


async def test_the_soft_limit_becomes_the_hard_one() -> None:
    process = await create_subprocess_exec(sys.executable, "-c", PROGRAM, stdout=PIPE)
    async with timeout(30):
        out, _ = await process.communicate()

    assert out.split() == [b"512", b"512", b"512"]
