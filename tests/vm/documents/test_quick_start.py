"""The quick start of README.md, by copying its blocks."""

from pathlib import Path

from tests.console import steps
from tests.guests.cache import REPOSITORY
from tests.vm.documents.copying import begin, copy
from tests.vm.documents.sandbox import sandbox

PAGE = REPOSITORY / "README.md"
UIDS = {"HOSTD_VMM_UID_BASE": "2110000000"}  # other tests count processes by uid


async def test_the_quick_start_works_by_copying(tmp_path: Path) -> None:
    async with sandbox(tmp_path, UIDS) as shell:
        await begin(shell)

        for step in steps(PAGE, "test_the_quick_start_works_by_copying"):
            await copy(step, shell)

        left = await shell.type(
            "ls /var/lib; ls -d /run/hostd; nft list tables; find /sys/fs/cgroup -name hostd"
        )
    assert left == (0, "dpkg\nls: cannot access '/run/hostd': No such file or directory\n")
