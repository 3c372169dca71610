"""The versions of Firecracker that hostd supports, and the one that the settings name.

Source: `firecracker --version`, `jailer --version`, read once, at start.
"""

import os
import re
import tempfile

from handlers.errors import HostFault
from handlers.host.vmm import spawn
from schemas.settings import Settings

# The one place that says so; tests/unit/vmm/test_versions.py checks every text that repeats it.
OLDEST, NEWEST = (1, 12), (1, 16)
LINE = re.compile(rb"^(Firecracker|Jailer) v([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})", re.MULTILINE)

Version = tuple[int, int, int]


async def check_versions(settings: Settings) -> str:
    """Check that Firecracker and jailer have one supported version; returns it, e.g. `1.12.1`.

    Raises:
        HostFault: not executable, not Firecracker, of two versions, or of one not supported.
    """
    firecracker = await _version(settings.vmm.firecracker, "Firecracker")
    jailer = await _version(settings.vmm.jailer, "Jailer")
    if firecracker != jailer:
        raise HostFault(
            "[vmm] firecracker and jailer must have the same version: "
            f"firecracker is {_text(firecracker)}, jailer is {_text(jailer)}"
        )
    if not OLDEST <= firecracker[:2] <= NEWEST:
        raise HostFault(f"Firecracker {_text(firecracker)} is not supported: install {supported()}")
    return _text(firecracker)


def supported() -> str:
    """The supported versions, as messages and documents write them."""
    return f"{_text(OLDEST)} to {_text(NEWEST)}"


def parse_version(text: str) -> Version:
    """`1.12.1` as numbers; a suffix (`-dev`) is ignored.

    Raises:
        HostFault: not a version.
    """
    match = re.match(r"v?([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})(?![0-9])", text)
    if match is None:
        raise HostFault(f"invalid version of the VMM: got {text[:40]!r}, want e.g. 1.12.1")
    return int(match[1]), int(match[2]), int(match[3])


async def _version(program: str, name: str) -> Version:
    with tempfile.TemporaryFile() as output:
        try:
            code = await spawn.run([program, "--version"], output.fileno())
        except OSError as error:
            raise HostFault(f"cannot execute {program}: {error.strerror}") from error
        text = os.pread(output.fileno(), 4096, 0)
    match = LINE.search(text)
    if code != 0 or match is None or match[1] != name.encode():
        printed = text.partition(b"\n")[0][:80].decode(errors="replace")
        raise HostFault(
            f"[vmm] {name.lower()}: expected `{program} --version` to print '{name} v<version>', "
            f"found '{printed}' (exit status {code}): set the path of the {name.lower()} binary"
        )
    return int(match[2]), int(match[3]), int(match[4])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)
