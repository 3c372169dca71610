"""The requests and replies of Firecracker's API, by its own field names, for versions 1.12 to 1.17.

Only what hostd sends and reads. Firecracker refuses unknown fields, so a field that is newer than
OLDEST carries `Since`, and `for_version` drops it for an older VMM: by that alone. A field that
equals its default is not sent.

Source: src/firecracker/swagger/firecracker.yaml of those versions.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, TypeVar, get_type_hints

import msgspec

from handlers.errors import Conflict, Failure, Invalid, errno_name, failure_class
from handlers.host.vmm.versions import Version
from handlers.specs import BootConfig, DriveConfig

IFACE_ID = "eth0"
GUEST_CID = 3
FAULT_CHARS = 400
OS_ERROR = re.compile(r"\(os error (\d+)\)")
WRONG_STATE = "The requested operation is not supported"
# The image does not fit the memory, or is not one.
CANNOT_LOAD = re.compile("(?:Cannot load|Error with) (kernel|initrd)")
IMAGES = {"kernel": "vmlinux", "initrd": "initrd"}
NOT_AFTER_CONFIGURING = "Loading a microVM snapshot not allowed after configuring"
CONTROLS = dict.fromkeys(range(32), " ")


@dataclass(frozen=True, slots=True)
class Since:
    """Metadata of a field: the first version of Firecracker that accepts it.

    On every required field of a body it means that the endpoint itself is new in that version.
    """

    major: int
    minor: int

    def accepts(self, version: Version) -> bool:
        return version >= (self.major, self.minor)


class Body(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a request. Every one of them goes through `for_version`."""


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
    """The guest's serial console. Without it, that of a jailed VMM is /dev/null."""

    serial_out_path: Annotated[str, Since(1, 14)]


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
    clock_realtime: Annotated[bool | None, Since(1, 16)] = None


class InstanceInfo(msgspec.Struct, frozen=True):
    """The reply to `GET /`. `state`: `Not started`, `Running` or `Paused`."""

    id: str
    state: str
    vmm_version: str


class VersionInfo(msgspec.Struct, frozen=True):
    """The reply to `GET /version`."""

    firecracker_version: str


class Fault(msgspec.Struct, frozen=True):
    """The body of an error reply; `error` is set when the HTTP itself was malformed."""

    fault_message: str = ""
    error: str = ""


Request = tuple[str, str, Body]
BodyT = TypeVar("BodyT", bound=Body)


@cache
def versioned_fields(kind: type[Body]) -> dict[str, Since]:
    """The fields of a body that not every supported version accepts."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: mark
        for name, hint in hints.items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, Since)
    }


@cache
def fields_of(kind: type[Body]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind)


def is_versioned(body: Body) -> bool:
    """Whether it depends on the VMM's version what of the body may be sent."""
    nested = (getattr(body, name) for name in body.__struct_fields__)
    return bool(versioned_fields(type(body))) or any(
        is_versioned(value) for value in nested if isinstance(value, Body)
    )


def for_version(body: BodyT, version: Version) -> BodyT | None:
    """The body as this version of Firecracker accepts it: newer fields get their defaults.

    None if a newer field has no default, i.e. the endpoint is newer: do not send the request.
    """
    since = versioned_fields(type(body))
    changes: dict[str, object] = {}
    for field in fields_of(type(body)):
        value = accepted = getattr(body, field.name)
        if field.name in since and not since[field.name].accepts(version):
            accepted = None
        elif isinstance(value, Body):
            accepted = for_version(value, version)
        if accepted is None and value is not None:
            if field.required:
                return None
            accepted = field.default
        if accepted is not value:
            changes[field.name] = accepted
    return msgspec.structs.replace(body, **changes) if changes else body


def boot_requests(config: BootConfig) -> list[Request]:
    """All requests before InstanceStart, in order; the guest sees drives in that order too."""
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
    if config.serial is not None:
        requests.append(("PUT", "/serial", SerialDevice(config.serial)))
    return requests


def _drive(drive: DriveConfig) -> Drive:
    """A writable drive honours the guest's flushes: what it synced survives a host crash."""
    return Drive(
        drive.drive_id,
        drive.path_in_jail,
        drive.root_device,
        drive.read_only,
        None if drive.read_only else "Writeback",
    )


def load_request(state_path: str, mem_path: str) -> Request:
    """A load that leaves the VM paused. From 1.16 on the guest's clock advances only on request."""
    body = SnapshotLoad(
        state_path,
        MemoryBackend("File", mem_path),
        resume_vm=False,
        clock_realtime=True,
    )
    return "PUT", "/snapshot/load", body


def refusal(method: str, path: str, status: int, body: bytes) -> Failure:
    """The failure for a reply other than 2xx.

    What is wrong with the pool's images is `Invalid`. Else its class comes from the number in
    `(os error N)`, never from the text, which differs by libc.
    A fault about the HTTP itself has a raw newline inside its JSON string.
    """
    text = body.decode(errors="replace").translate(CONTROLS)
    try:
        fault = msgspec.json.decode(text, type=Fault)
        message = (fault.fault_message or fault.error or text)[:FAULT_CHARS]
    except (ValueError, RecursionError):
        message = text[:FAULT_CHARS]
    if unloadable := CANNOT_LOAD.search(message):
        name = IMAGES[unloadable[1]]
        return Invalid(
            f"the pool's {name} cannot be booted with its instance_resources.mem_mib:"
            f" Firecracker refused {method} {path}: {message}",
            path=name,
            detail={"http_status": status},
        )
    found = OS_ERROR.search(message)
    number = int(found[1]) if found else None
    if message.startswith(WRONG_STATE) or NOT_AFTER_CONFIGURING in message:
        kind: type[Failure] = Conflict
    else:
        kind = failure_class(number)
    errno = {} if number is None else {"errno": errno_name(number)}
    return kind(
        f"Firecracker refused {method} {path}: {message}", detail={"http_status": status, **errno}
    )
