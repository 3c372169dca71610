"""The versions of Firecracker that hostd supports, what each lacks, and that of two programs.

`binaries.py` decides which programs a launch executes.

Source: `firecracker --version`, `jailer --version`; CHANGELOG.md of Firecracker.
"""

import os
import re
import tempfile
from typing import Final

from handlers.errors import HostFault
from handlers.host.vmm import spawn
from schemas.naming import VERSION_PATTERN

# The one place that says so; tests/unit/vmm/test_versions.py checks every text that repeats it.
# 1.17 by the API of its development branch alone: no test ran against a release of it (ADR 1044).
OLDEST, NEWEST = (1, 12), (1, 17)
LINE = re.compile(rb"^(Firecracker|Jailer) v([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})", re.MULTILINE)

Version = tuple[int, int, int]
# What guests or operators miss before a version. What hostd sends by version: `api_schema.Since`.
KNOWN: Final = (
    ((1, 14), "serial console in a file (pool tag hostd.serial)"),
    ((1, 14), "no soft lockup of guests after a restore"),
    ((1, 14), "no vsock data corruption with guest kernels from 6.17 on"),
    ((1, 16), "guest clock advanced by the VMM at a Wake (before, by the guest agent alone)"),
    ((1, 16), "vsock and serial console intact after a snapshot taken in mid-transfer"),
    ((1, 17), "new vsock connections to the guest after a Sleep that failed once it had paused"),
)


async def version_of_pair(firecracker_path: str, jailer_path: str) -> Version:
    """The version that both programs have.

    Raises:
        HostFault: not executable, not Firecracker, or of two versions.
    """
    firecracker = await _version(firecracker_path, "Firecracker")
    jailer = await _version(jailer_path, "Jailer")
    if firecracker != jailer:
        raise HostFault(
            "[vmm] firecracker and jailer must have the same version: "
            f"firecracker is {text_of(firecracker)}, jailer is {text_of(jailer)}"
        )
    return firecracker


def check_supported(version: Version, *, allow_untested: bool) -> None:
    """Raise HostFault unless it is supported; one newer than the newest may be allowed."""
    if version[:2] >= OLDEST and (version[:2] <= NEWEST or allow_untested):
        return
    newer = version[:2] > NEWEST
    raise HostFault(
        f"Firecracker {text_of(version)} is not supported: install {supported()}"
        + (", or set [vmm] allow_untested to try it" if newer else "")
    )


def lacks(version: Version) -> list[str]:
    """What a version does not have yet of what a newer one has."""
    return [text for since, text in KNOWN if version[:2] < since]


def supported() -> str:
    """The supported versions, as messages and documents write them."""
    return f"{text_of(OLDEST)} to {text_of(NEWEST)}"


def parse_version(text: str) -> Version:
    """`1.12.1` as numbers; a suffix (`-dev`) is ignored.

    Raises:
        HostFault: not a version.
    """
    match = VERSION_PATTERN.match(text)
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


def text_of(version: tuple[int, ...]) -> str:
    """As messages, manifests and file names have it, e.g. `1.12.1`."""
    return ".".join(str(number) for number in version)
