"""Which Firecracker and jailer the settings name: asked once, at start.

Source: `firecracker --version`, `jailer --version`.
"""

import os
import re
import tempfile

from handlers.errors import HostFault
from handlers.host.vmm import spawn
from schemas.settings import Settings

OLDEST, NEWEST = (1, 12), (1, 16)
LINE = re.compile(rb"^(?:Firecracker|Jailer) v(\d+)\.(\d+)\.(\d+)", re.MULTILINE)


async def check_versions(settings: Settings) -> str:
    """That both are of one version that hostd knows; returns it, e.g. `1.12.1`.

    Raises:
        HostFault: not executable, no Firecracker, of two versions, or of one not supported.
    """
    firecracker = await _version(settings.vmm.firecracker)
    jailer = await _version(settings.vmm.jailer)
    if firecracker != jailer:
        raise HostFault(f"firecracker is {_text(firecracker)}, jailer is {_text(jailer)}")
    if not OLDEST <= firecracker[:2] <= NEWEST:
        raise HostFault(
            f"Firecracker {_text(firecracker)} is not supported: "
            f"{_text(OLDEST)} to {_text(NEWEST)} are"
        )
    return _text(firecracker)


async def _version(program: str) -> tuple[int, ...]:
    with tempfile.TemporaryFile() as output:
        try:
            code = await spawn.run([program, "--version"], output.fileno())
        except OSError as error:
            raise HostFault(f"{program} cannot be executed: {error.strerror}") from error
        said = os.pread(output.fileno(), 4096, 0)
    found = LINE.search(said)
    if code != 0 or found is None:
        raise HostFault(f"{program} --version does not tell a version of Firecracker")
    return tuple(int(number) for number in found.groups())


def _text(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)
