"""The limit of descriptors is raised and checked before anything is opened, and has a reserve."""

import resource
import sys
from asyncio import create_subprocess_exec, timeout
from asyncio.subprocess import PIPE

import pytest
import structlog

from schemas.settings import Settings
from worker.descriptors import check_limit, needed

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


RESERVE = """
import os, resource
from worker.descriptors import DescriptorReserve
reserve = DescriptorReserve(2)
print(reserve.has_free())
number = os.open("/dev/null", os.O_RDONLY)
os.close(number)
resource.setrlimit(resource.RLIMIT_NOFILE, (number, 512))
print(reserve.has_free(), reserve.release(), reserve.release(), reserve.release())
taken = os.open("/dev/null", os.O_RDONLY)
print(reserve.refill(), reserve.has_free())
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
print(reserve.has_free())
"""


async def test_the_reserve_is_there_when_no_descriptor_is_free_and_is_refilled() -> None:
    process = await create_subprocess_exec(sys.executable, "-c", RESERVE, stdout=PIPE)
    async with timeout(30):
        out, _ = await process.communicate()

    said = [line for line in out.decode().splitlines() if "descriptors.exhausted" not in line]
    assert said == ["True", "False True True False", "False False", "True"]


@pytest.mark.parametrize(("limit", "warned"), [(0, 1), (1, 0)])
def test_a_limit_below_what_the_host_can_need_is_reported(limit: int, warned: int) -> None:
    settings = Settings()
    wanted = needed(settings, 512 + 10 * 192)
    assert wanted == 256 + 16 * (4 + 8 + 16 + 2 + 4) + 3 * 10
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted - 1 + limit, before[1]))
    try:
        with structlog.testing.capture_logs() as logs:
            check_limit(settings, 512 + 10 * 192)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    assert len(logs) == warned
    assert all(str(wanted) in line["remedy"] for line in logs)


def test_there_are_never_more_vms_than_uids() -> None:
    settings = Settings()
    most = needed(settings, 1 << 40)
    assert most - needed(settings, 0) == 3 * settings.vmm.uid_count
