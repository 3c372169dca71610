"""The distribution's kernel, unpacked and not installed: build/guests/kernel/{vmlinux,modules/}.

Firecracker and the lab boot the ELF inside the bzImage; the modules are the package's own tree.
"""

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from tests.guests import cache

METAPACKAGE = "linux-image-cloud-amd64"
TARGET = cache.BUILD / "guests" / "kernel"
VMLINUX = TARGET / "vmlinux"
MODULES = TARGET / "modules"  # the contents of /lib/modules/<release>
RELEASE = TARGET / "release"

SETUP_SECTORS_AT = 0x1F1
PAYLOAD_AT = 0x248  # payload_offset, payload_length of the setup header (boot protocol 2.08)
SIZE_LENGTH = 4
LZ4_LEGACY = b"\x02\x21\x4c\x18"
ELF = b"\x7fELF"


def ensure_kernel() -> bool:
    """Have the kernel unpacked; True if it was fetched now. A newer package alone is no reason."""
    return cache.ensure(TARGET, cache.digest(Path(__file__)), _build)


def release() -> str:
    """Its version as `uname -r` says it."""
    return RELEASE.read_text()


def _build(directory: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # Readable for apt's own user, which does the download.
        Path(scratch).chmod(0o777)
        package = _download(Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
        (image,) = (unpacked / "boot").glob("vmlinuz-*")
        (directory / "release").write_text(image.name.removeprefix("vmlinuz-"))
        (directory / "vmlinux").write_bytes(_vmlinux(image.read_bytes()))
        modules = unpacked / "lib" / "modules" / image.name.removeprefix("vmlinuz-")
        shutil.copytree(modules, directory / "modules", ignore=shutil.ignore_patterns("build"))


def _download(directory: Path) -> Path:
    try:
        return _download_as_listed(directory)
    except (LookupError, subprocess.CalledProcessError):
        # No package lists on this machine, or ones that are older than the mirror.
        subprocess.run(["apt-get", "update", "--quiet", "--quiet"], check=True)
        return _download_as_listed(directory)


def _download_as_listed(directory: Path) -> Path:
    depends = subprocess.run(
        ["apt-cache", "depends", "--important", METAPACKAGE],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = [word for word in depends.split() if word.startswith("linux-image-6")]
    if not names:
        raise LookupError(f"apt knows no dependency of {METAPACKAGE}")
    download = ["apt-get", "download", "--quiet", "--quiet", names[0]]
    subprocess.run(download, check=True, cwd=directory, stderr=subprocess.DEVNULL)
    (package,) = directory.glob("*.deb")
    return package


def _vmlinux(bzimage: bytes) -> bytes:
    setup_sectors = bzimage[SETUP_SECTORS_AT] or 4
    offset, length = struct.unpack_from("<II", bzimage, PAYLOAD_AT)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if not payload.startswith(LZ4_LEGACY):
        raise SystemExit(f"kernel is not compressed by LZ4: {payload[:6].hex()}")
    compressed = payload[:-SIZE_LENGTH]  # its uncompressed size follows it
    vmlinux = subprocess.run(["lz4", "-dc"], input=compressed, stdout=subprocess.PIPE, check=True)
    if not vmlinux.stdout.startswith(ELF):
        raise SystemExit("what the kernel image holds is not an ELF file")
    return vmlinux.stdout


if __name__ == "__main__":
    ensure_kernel()
