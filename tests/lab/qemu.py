"""The lab's QEMU: its command line, with the reasons. Reads nothing from the guest.

Always TCG emulation, so that the lab behaves the same with and without nested KVM.
"""

import fcntl
import io
import os
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.guests import cache
from tests.lab import build

KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_GET_TSC_KHZ = 0xAE01, 0xAE41, 0xAEA3
MIB = 1 << 20
# The parts of the repository in a run; byte code too, for compiling is slow in the lab.
SOURCE = ("worker", "handlers", "schemas", "tests", "bench", "deploy", "pyproject.toml")
KERNEL_ARGUMENTS = (
    "quiet loglevel=3 console=ttyS0 reboot=t panic=-1 nokaslr mitigations=off tsc=reliable "
    "no_timer_check random.trust_cpu=on cryptomgr.notests init_on_alloc=0 nopti no5lvl lsm=none "
    "audit=0 "
    # A lost one-shot timer interrupt leaves QEMU 7.2's only processor halted forever; with a
    # periodic tick it only delays. Likewise one processor, not two: see boot/hold_vm.c.
    "nohz=off highres=off"
)


def command_line(
    source: Path, *, mem_mib: int, shell: bool = False, systemd: bool = False
) -> list[str]:
    """QEMU with the lab's three drives: system (changes are dropped), payload, `source`."""
    # Without its frequency the kernel measures the clock against an emulated timer and may hang.
    arguments = f"{KERNEL_ARGUMENTS} tsc_early_khz={tsc_khz()}"
    arguments += " lab.shell" * shell + " lab.systemd" * systemd
    command = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
    command += ["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]
    command += ["-M", "microvm,x-option-roms=off", "-accel", "tcg,thread=multi,tb-size=512"]
    command += ["-cpu", "max", "-smp", "1", "-m", str(mem_mib)]
    command += ["-kernel", str(build.SYSTEM / "vmlinux"), "-initrd", str(build.INITRD)]
    command += ["-append", arguments]
    command += ["-serial", "mon:stdio" if shell else "stdio"]
    command += ["-object", "rng-random,id=rng,filename=/dev/urandom"]
    command += ["-device", "virtio-rng-device,rng=rng"]
    drives = {
        "system": f"file={build.ROOT_IMAGE},snapshot=on,cache=unsafe",
        "payload": f"file={build.PAYLOAD_IMAGE},readonly=on",
        "source": f"file={source},readonly=on",
    }
    for name, options in drives.items():
        command += ["-drive", f"id={name},format=raw,if=none,{options}"]
        command += ["-device", f"virtio-blk-device,drive={name}"]
    return command


def write_source(
    target: Path, argv: Sequence[str], files: Mapping[str, Path], environment: Mapping[str, str]
) -> None:
    """The tar on the third drive: the project at its own path, `files`, the command to run.

    Args:
        files: path in the lab -> file or directory on this machine.
    """
    root, venv = cache.REPOSITORY, build.VENV
    byte_code = [sys.executable, "-m", "compileall", "-q"]
    directories = [root / name for name in SOURCE if (root / name).is_dir()]
    subprocess.run([*byte_code, *directories], check=False, stdout=subprocess.DEVNULL)
    setup = [f"ln -sfn /payload/venv {shlex.quote(str(venv))}"]
    if root / ".venv" != venv:
        setup.append(f"ln -sfn {shlex.quote(str(venv))} {shlex.quote(str(root / '.venv'))}")
    # A writable directory around them: builders make lock files beside what is up to date.
    for name in ("bin", "guests"):
        place = shlex.quote(f"{root}/build/{name}")
        setup.append(f"mkdir -p {place} && mount --bind /payload/build/{name} {place}")
    exports = {"PYTHONPATH": str(root), "HOSTD_LAB": "1", **environment}
    setup += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    setup += [f"export PATH={shlex.quote(str(venv))}/bin:$PATH", f"cd {shlex.quote(str(root))}"]
    with tarfile.open(target, "w") as tar:
        _add_dir(tar, root)
        _add_dir(tar, venv.parent)
        for name in SOURCE:
            if (root / name).exists():
                tar.add(root / name, str(root / name).lstrip("/"))
        for place, path in files.items():
            tar.add(path, place.lstrip("/"))
        _add_text(tar, "lab/environment", "\n".join(setup) + "\n")
        _add_text(tar, "lab/command", shlex.join(argv) + "\n")
    os.truncate(target, -(-target.stat().st_size // MIB) * MIB)


def _add_dir(tar: tarfile.TarFile, path: Path) -> None:
    directory = tarfile.TarInfo(str(path).lstrip("/"))
    directory.type, directory.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(directory)


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    file = tarfile.TarInfo(name)
    file.size = len(text.encode())
    tar.addfile(file, io.BytesIO(text.encode()))


def tsc_khz() -> int:
    """The frequency of this machine's time stamp counter: from KVM, else the nominal one."""
    try:
        return _tsc_khz_of_kvm()
    except OSError:
        megahertz = next(
            line.split(":")[1]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("cpu MHz")
        )
        return int(float(megahertz) * 1000)


def _tsc_khz_of_kvm() -> int:
    opened: list[int] = []
    try:
        opened.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        opened.append(fcntl.ioctl(opened[0], KVM_CREATE_VM, 0))
        opened.append(fcntl.ioctl(opened[1], KVM_CREATE_VCPU, 0))
        return fcntl.ioctl(opened[2], KVM_GET_TSC_KHZ, 0)
    finally:
        for descriptor in reversed(opened):
            os.close(descriptor)
