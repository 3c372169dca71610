"""Build the mini guest: build/guests/mini/{vmlinux,rootfs.ext4}, what a pool's revision holds."""

import subprocess
from pathlib import Path

from tests.guests import cache

SOURCE = Path(__file__).parent
TARGET = cache.BUILD / "guests" / "mini"
VMLINUX = TARGET / "vmlinux"
ROOTFS = TARGET / "rootfs.ext4"

COMPILE = ["gcc", "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror"]
FREESTANDING = ["-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie"]
# What neither the instruction emulator nor a guest without a kernel can bear.
PLAIN_CODE = [
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-fcf-protection=none",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-jump-tables",
    "-fno-tree-loop-distribute-patterns",
]
LINK = ["-Wl,--build-id=none", "-Wl,-z,max-page-size=4096", "-Wl,--no-warn-rwx-segments", "-s"]
ROOTFS_OPTIONS = ["-q", "-F", "-L", "mini-root", "-O", "^has_journal", "-N", "16"]


def ensure_mini_guest() -> bool:
    """Have the mini guest built from the source beside this file; True if it was built now."""
    return cache.ensure(TARGET, cache.digest(SOURCE, SOURCE.parent / "json.h"), _build)


def _build(directory: Path) -> None:
    sources = [str(path) for path in sorted(SOURCE.glob("*.[cS]"))]
    script = f"-Wl,-T,{SOURCE / 'mini.ld'}"
    command = [*COMPILE, *FREESTANDING, *PLAIN_CODE, *LINK, script, *sources]
    subprocess.run([*command, "-o", str(directory / "vmlinux")], check=True)
    rootfs = directory / "rootfs.ext4"
    make_rootfs = ["mkfs.ext4", *ROOTFS_OPTIONS, str(rootfs), "1M"]
    subprocess.run(make_rootfs, check=True, capture_output=True)


if __name__ == "__main__":
    ensure_mini_guest()
