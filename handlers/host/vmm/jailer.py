"""One execution of the jailer, which daemonizes the jailed VMM and exits.

The jailer reports neither a missing parent cgroup nor a VMM that dies after daemonizing. So what it
needs is checked before it runs, and `vmms` and `confinement` read back what it did.

Source: docs/jailer.md of Firecracker; proven in tests/contract/test_jailer.py.
"""

import os
import resource
import shutil
import time

from handlers.errors import HostFault, of_os_error
from handlers.host.vmm import spawn
from handlers.host.vmm.binaries import VmmBinaries
from handlers.host.vmm.cgroups import CgroupTree
from handlers.host.vmm.confinement import NO_FILE
from handlers.jail_names import (
    API_SOCKET,
    DEVICES_DIR,
    FIRECRACKER,
    LOG,
    PID_FILE,
    RUN_DIR,
    VSOCK_SOCKET,
    in_jail,
)
from handlers.specs import LaunchSpec
from schemas.settings import Settings

STDERR_BYTES = 4096
LAUNCH_LOG_BYTES = 1_048_576
JAILER_MAKES = (DEVICES_DIR, RUN_DIR, PID_FILE, FIRECRACKER, API_SOCKET, VSOCK_SOCKET)


class Jailer:
    """Runs the jailer for jails below `[vmm] jail_base`.

    Needs: CAP_SYS_ADMIN, CAP_MKNOD, CAP_CHOWN, CAP_SETUID, CAP_SETGID, CAP_DAC_OVERRIDE.
    """

    def __init__(self, settings: Settings, binaries: VmmBinaries | None = None) -> None:
        self._binaries = binaries or VmmBinaries(settings)
        self._file_bytes = settings.vmm.max_file_mib << 20
        self._jail_base = settings.jail_base
        self._tree = CgroupTree.of(settings)
        self._launches = LaunchLog(settings.paths.state)

    def prepare(self, spec: LaunchSpec, root: str) -> None:
        """Check what the jailer fails silently without; remove what an earlier run left.

        Raises:
            HostFault: names what is missing, misnamed or changed.
        """
        firecracker = self._binaries.unchanged_pair(spec.version).firecracker
        linked = os.path.islink(firecracker)
        executable = os.path.basename(os.path.realpath(firecracker) if linked else firecracker)
        if executable != FIRECRACKER:
            raise HostFault(
                f"invalid [vmm] firecracker {firecracker}: the file is named {executable}, "
                f"want {FIRECRACKER} (the jailer names the jails' directory after it)",
                path=firecracker,
            )
        if not os.path.isdir(self._tree.path(spec.cgroup)):
            raise HostFault(
                f"cgroup {spec.cgroup} is missing (the jailer fails silently without it)"
            )
        if not os.path.isfile(f"{root}/{LOG}"):
            raise HostFault(
                f"jail {spec.jail_id} has no log file (the VMM fails silently without it)",
                path=root,
            )
        clear(root)
        try:
            self._launches.record(spec.jail_id, spec.uid)
        except OSError as error:
            raise of_os_error(error, "cannot write the launch log") from error

    def arguments(self, spec: LaunchSpec) -> list[str]:
        """The whole command line of one launch.

        Raises:
            HostFault: the version is not on this host.
        """
        pair = self._binaries.launch_pair(spec.version)
        return [
            pair.jailer,
            *("--id", spec.jail_id),
            *("--exec-file", pair.firecracker),
            *("--uid", str(spec.uid)),
            *("--gid", str(spec.uid)),
            *("--chroot-base-dir", self._jail_base),
            *("--cgroup-version", "2"),
            *("--parent-cgroup", spec.cgroup),
            *("--resource-limit", f"no-file={NO_FILE}"),
            *("--resource-limit", f"fsize={self._file_bytes}"),
            "--new-pid-ns",
            "--daemonize",
            "--",
            *("--api-sock", in_jail(API_SOCKET)),
            *("--log-path", in_jail(LOG)),
            *("--level", "Info"),
        ]

    async def run(self, spec: LaunchSpec, root: str, output: int) -> None:
        """Prepare the jail, then run until the first process exits, which it does once the VMM is
        daemonized.

        `output` is a file descriptor for stdout and stderr.

        Raises:
            HostFault: as `prepare`; it cannot be executed, or failed; its output is in the detail.
        """
        arguments = self.arguments(spec)
        try:
            # The jailer has no option for it; the VMM inherits it. A core has the guest's memory.
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = await spawn.run(arguments, output, first=lambda: self.prepare(spec, root))
        except OSError as error:
            raise of_os_error(error, f"cannot execute {arguments[0]}") from error
        if code != 0:
            text = os.pread(output, STDERR_BYTES, 0).decode(errors="replace").strip()
            raise HostFault(
                f"jailer exited with status {code}: {_reason(text)}",
                detail={"exit_code": code, "jailer": text},
            )


class LaunchLog:
    """`<state>/launches.log`, root-only: one line per jailer execution.

    Bounded: past 1 MiB the file becomes `launches.log.1`, replacing the previous one.
    """

    def __init__(self, state_dir: str) -> None:
        self._path = f"{state_dir}/launches.log"

    def record(self, jail_id: str, uid: int) -> None:
        """Append `<unix ms> <jail id> <uid>`, before the jailer is executed.

        Raises:
            OSError: the state directory cannot be written; nothing may be started then.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._path, flags, 0o600)
        try:
            os.write(fd, f"{time.time_ns() // 1_000_000} {jail_id} {uid}\n".encode())
            full = os.fstat(fd).st_size >= LAUNCH_LOG_BYTES
        finally:
            os.close(fd)
        if full:
            os.replace(self._path, f"{self._path}.1")


def _reason(output: str) -> str:
    """The one line of a panic's output that has the error."""
    lines = output.splitlines() or ["no output"]
    return next((line for line in lines if "error" in line), lines[0])[:400]


def clear(root: str) -> None:
    """Remove what a jailer makes in a jail: it does not start if any of it exists."""
    try:
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for name in JAILER_MAKES:
            try:
                os.unlink(name, dir_fd=directory)
            except FileNotFoundError:
                continue
            except (IsADirectoryError, PermissionError):
                shutil.rmtree(name, dir_fd=directory)
    except OSError as error:
        raise of_os_error(error, f"cannot remove the jailer's files in {root}") from error
    finally:
        os.close(directory)
