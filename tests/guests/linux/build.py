"""Build the Linux guest: build/guests/linux/{vmlinux,initrd,rootfs.ext4}, a pool's revision."""

import os
import subprocess
import tempfile
from pathlib import Path

from tests.guests import cache, kernel

SOURCE = Path(__file__).parent
TARGET = cache.BUILD / "guests" / "linux"
VMLINUX = TARGET / "vmlinux"
INITRD = TARGET / "initrd"
ROOTFS = TARGET / "rootfs.ext4"

# Each after those that it needs. Firecracker's devices appear through ACPI.
MODULE_ORDER = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "net/vmw_vsock/vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common",
    "net/vmw_vsock/vmw_vsock_virtio_transport",
)
COMPILE = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s"]


def ensure_linux_guest() -> bool:
    """Have the Linux guest built, its kernel fetched first; True if it was built now."""
    kernel.ensure_kernel()
    inputs = cache.digest(SOURCE, SOURCE.parent / "json.h", kernel.release(), _stamp_of_kernel())
    return cache.ensure(TARGET, inputs, _build)


def _stamp_of_kernel() -> str:
    return (kernel.TARGET / ".inputs").read_text()


def _build(directory: Path) -> None:
    os.link(kernel.VMLINUX, directory / "vmlinux")
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        for name in ("dev", "modules", "proc", "sys"):
            (tree / name).mkdir()
        sources = [str(path) for path in sorted(SOURCE.glob("*.c"))]
        subprocess.run([*COMPILE, *sources, "-o", str(tree / "init")], check=True)
        copy_modules(tree / "modules", MODULE_ORDER)
        write_initrd(tree, directory / "initrd")
    rootfs = ["mkfs.ext4", "-q", "-F", "-L", "linux-root", "-O", "^has_journal", "-N", "16"]
    subprocess.run([*rootfs, str(directory / "rootfs.ext4"), "1M"], check=True, capture_output=True)


def copy_modules(directory: Path, order: tuple[str, ...]) -> None:
    """The modules as files side by side, with their order in the file `order`."""
    for name in order:
        module = kernel.MODULES / "kernel" / f"{name}.ko"
        (directory / module.name).write_bytes(module.read_bytes())
    (directory / "order").write_text("".join(f"{Path(name).name}.ko\n" for name in order))


def write_initrd(tree: Path, initrd: Path) -> None:
    """Pack a directory as the kernel unpacks it: newc, all owned by root."""
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    with initrd.open("wb") as file:
        subprocess.run(
            ["cpio", "--create", "--format=newc", "--owner=0:0", "--quiet"],
            input="\n".join([".", *names]).encode(),
            stdout=file,
            cwd=tree,
            check=True,
        )


if __name__ == "__main__":
    ensure_linux_guest()
