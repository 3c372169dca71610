"""`mkfs.ext4` on an open file, without a loop device. Source: mke2fs(8)."""

import os
import subprocess

from handlers.errors import HostFault, of_os_error

MKFS = "mkfs.ext4"
TIMEOUT_S = 120.0


def make_ext4(fd: int, *, label: str, options: tuple[str, ...] = ()) -> None:
    """Make a file system over the whole file; it needs no name, `/proc/self/fd` is enough.

    Raises:
        HostFault: mkfs.ext4 is missing or fails; its last line is in the message.
        Exhausted: the disk is full.
    """
    command = [MKFS, "-q", "-F", "-L", label, *options, f"/proc/self/fd/{fd}"]
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        ran = subprocess.run(  # noqa: S603 - a fixed command, a label and options of our own
            command,
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={"PATH": path, "LC_ALL": "C"},
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HostFault(f"{MKFS} took more than {TIMEOUT_S:g} s") from error
    except OSError as error:
        raise of_os_error(error, f"cannot run {MKFS}") from error
    if ran.returncode:
        raise _failed(fd, ran.stderr.decode(errors="replace").strip())


def _failed(fd: int, said: str) -> Exception:
    last = said.splitlines()[-1][:300] if said else "no message"
    if "No space left" in said or "no space" in said.lower():
        return of_os_error(OSError(28, ""), f"{MKFS}: {last}")
    return HostFault(f"{MKFS} failed: {last}", detail={"size_bytes": os.fstat(fd).st_size})
