"""What Firecracker's API takes and gives, by its own field names, for versions 1.12 to 1.16.

Only what hostd sends and reads. Firecracker refuses unknown fields, so a field that a version does
not know must not be sent to it; `None` fields are left out.

Source: src/firecracker/swagger/firecracker.yaml of those versions.
"""

import re
from typing import Literal

import msgspec

from handlers.errors import Conflict, Failure, HostFault, errno_name, failure_class
from handlers.specs import BootConfig, DriveConfig

IFACE_ID = "eth0"
GUEST_CID = 3
FAULT_CHARS = 400
OS_ERROR = re.compile(r"\(os error (\d+)\)")
WRONG_STATE = "The requested operation is not supported"
NOT_AFTER_CONFIGURING = "Loading a microVM snapshot not allowed after configuring"
CONTROLS = dict.fromkeys(range(32), " ")

Version = tuple[int, int, int]
SERIAL_SINCE: Version = (1, 14, 0)
CLOCK_REALTIME_SINCE: Version = (1, 16, 0)


class Body(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request's body."""


class MachineConfiguration(Body, frozen=True):
    vcpu_count: int
    mem_size_mib: int


class BootSource(Body, frozen=True):
    kernel_image_path: str
    boot_args: str
    initrd_path: str | None = None


class Drive(Body, frozen=True):
    drive_id: str
    path_on_host: str
    is_root_device: bool
    is_read_only: bool
    cache_type: Literal["Unsafe", "Writeback"] | None = None


class NetworkInterface(Body, frozen=True):
    iface_id: str
    host_dev_name: str
    guest_mac: str


class Vsock(Body, frozen=True):
    guest_cid: int
    uds_path: str


class SerialDevice(Body, frozen=True):
    serial_out_path: str


class Action(Body, frozen=True):
    action_type: Literal["InstanceStart", "SendCtrlAltDel"]


class VmState(Body, frozen=True):
    state: Literal["Paused", "Resumed"]


class SnapshotCreate(Body, frozen=True):
    snapshot_type: Literal["Full"]
    snapshot_path: str
    mem_file_path: str


class MemoryBackend(Body, frozen=True):
    backend_type: Literal["File"]
    backend_path: str


class SnapshotLoad(Body, frozen=True):
    snapshot_path: str
    mem_backend: MemoryBackend
    resume_vm: bool
    clock_realtime: bool | None = None


class InstanceInfo(msgspec.Struct, frozen=True):
    """The answer to `GET /`. `state`: `Not started`, `Running` or `Paused`."""

    id: str
    state: str
    vmm_version: str


class VersionInfo(msgspec.Struct, frozen=True):
    """The answer to `GET /version`."""

    firecracker_version: str


class Fault(msgspec.Struct, frozen=True):
    """The body of a refusal; what is wrong with the HTTP itself is told in `error`."""

    fault_message: str = ""
    error: str = ""


Request = tuple[str, str, Body]


def parse_version(text: str) -> Version:
    """`1.12.1` as numbers; what follows them (`-dev`) is left out.

    Raises:
        HostFault: not a version.
    """
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        raise HostFault(f"the VMM says that its version is {text[:40]!r}")
    return int(found[1]), int(found[2]), int(found[3])


def boot_requests(config: BootConfig, version: Version) -> list[Request]:
    """All calls that precede InstanceStart, in order; the guest sees drives in that order too.

    Before 1.14 there is no console file: the jailed VMM's console is /dev/null.
    """
    requests: list[Request] = [
        ("PUT", "/machine-config", MachineConfiguration(config.vcpus, config.mem_mib)),
        ("PUT", "/boot-source", BootSource(config.kernel, config.boot_args, config.initrd)),
    ]
    requests += [("PUT", f"/drives/{drive.drive_id}", _drive(drive)) for drive in config.drives]
    requests += [
        (
            "PUT",
            f"/network-interfaces/{IFACE_ID}",
            NetworkInterface(IFACE_ID, config.nic.tap, config.nic.mac),
        ),
        ("PUT", "/vsock", Vsock(GUEST_CID, config.vsock)),
    ]
    if config.serial is not None and version >= SERIAL_SINCE:
        requests.append(("PUT", "/serial", SerialDevice(config.serial)))
    return requests


def _drive(drive: DriveConfig) -> Drive:
    """A writable drive honours the guest's flushes, so that what it synced survives the host."""
    return Drive(
        drive.drive_id,
        drive.path_in_jail,
        drive.root_device,
        drive.read_only,
        None if drive.read_only else "Writeback",
    )


def load_request(state_path: str, mem_path: str, version: Version) -> Request:
    """A load that leaves the VM paused. From 1.16 the guest's clock must be asked to go on."""
    body = SnapshotLoad(
        state_path,
        MemoryBackend("File", mem_path),
        resume_vm=False,
        clock_realtime=True if version >= CLOCK_REALTIME_SINCE else None,
    )
    return "PUT", "/snapshot/load", body


def refusal(method: str, path: str, status: int, body: bytes) -> Failure:
    """The failure that a reply other than 2xx stands for.

    Its class comes from the number in `(os error N)`, never from words, which differ by libc.
    A fault about the HTTP itself has a raw newline inside its JSON string.
    """
    text = body.decode(errors="replace").translate(CONTROLS)
    try:
        fault = msgspec.json.decode(text, type=Fault)
        message = (fault.fault_message or fault.error or text)[:FAULT_CHARS]
    except (msgspec.DecodeError, RecursionError):
        message = text[:FAULT_CHARS]
    found = OS_ERROR.search(message)
    number = int(found[1]) if found else None
    if message.startswith(WRONG_STATE) or NOT_AFTER_CONFIGURING in message:
        kind: type[Failure] = Conflict
    else:
        kind = failure_class(number)
    return kind(
        f"Firecracker refused {method} {path}: {message}",
        detail={"status": status, "errno": None if number is None else errno_name(number)},
    )
