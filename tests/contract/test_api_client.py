"""Every request hostd sends and every reply it reads, proven against the real binary, unjailed."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from handlers.errors import Conflict, Exhausted, Failure, HostFault, Invalid, Unavailable
from handlers.host.vmm.api_client import VmmApi
from handlers.host.vmm.api_schema import (
    Action,
    Body,
    BootSource,
    Drive,
    MachineConfiguration,
    MemoryBackend,
    NetworkInterface,
    SerialDevice,
    SnapshotCreate,
    SnapshotLoad,
    VmState,
    Vsock,
)
from handlers.specs import BootConfig, DriveConfig, NicConfig
from tests.guests.firecracker import FIRECRACKER, VERSION
from tests.guests.namespace import own_network
from tests.vm import payload
from tests.vm.vmm_rig import MAC, MIB, TAP, add_tap, need

START = Action("InstanceStart")


class Vmm:
    """One Firecracker process in a directory, and hostd's client of its API."""

    def __init__(self, directory: Path, name: str = "vmm") -> None:
        need(FIRECRACKER, "/dev/kvm")
        self.directory = directory
        self.home = directory / name
        self.home.mkdir()
        (self.home / "log").touch()
        self.process = subprocess.Popen(
            [FIRECRACKER, "--id", "c1", "--api-sock", "api.sock", "--log-path", "log"],
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.api = VmmApi(str(self.home), timeout_s=5, snapshot_timeout_s=20)

    async def listening(self) -> "Vmm":
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(Unavailable):
                    await self.api.state()
                    return self
                await asyncio.sleep(0.001)

    async def end(self) -> None:
        await self.api.close()
        self.process.kill()
        self.process.wait()

    def config(self, code: bytes = payload.COUNT) -> BootConfig:
        """Paths as seen from the process's working directory."""
        payload.write(self.home / "vmlinux", code)
        (self.home / "initrd").write_bytes(b"0" * 512)
        (self.home / "rootfs").write_bytes(bytes(MIB))
        (self.home / "data").write_bytes(bytes(MIB))
        return BootConfig(
            vcpus=1,
            mem_mib=16,
            kernel="vmlinux",
            initrd="initrd",
            boot_args="reboot=k panic=1",
            drives=(
                DriveConfig("rootfs", "rootfs", read_only=True, root_device=True),
                DriveConfig("data", "data", read_only=False),
            ),
            nic=NicConfig(TAP, MAC),
            vsock="v.sock",
        )


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        add_tap(TAP, 0)
        yield


@pytest_asyncio.fixture
async def vmm(tmp_path: Path) -> AsyncIterator[Vmm]:
    made = Vmm(tmp_path)
    try:
        yield await made.listening()
    finally:
        await made.end()


async def running(vmm: Vmm) -> Vmm:
    await vmm.api.configure(vmm.config())
    await vmm.api.start()
    return vmm


async def refused(vmm: Vmm, method: str, path: str, body: Body) -> Failure:
    with pytest.raises(Failure) as failure:
        await vmm.api._call(method, path, msgspec.json.encode(body), 5)
    return failure.value


# -- what hostd sends, and reads ------------------------------------------------------------------


async def test_the_whole_life_of_a_vm_with_every_request(tmp_path: Path, vmm: Vmm) -> None:
    api = vmm.api
    assert await api.version() == VERSION
    assert await api.state() == "Not started"
    assert (await api.info()).id == "c1"
    await api.configure(vmm.config())
    await api.start()
    assert await api.state() == "Running"
    await api.send_ctrl_alt_del()
    await api.pause()
    assert await api.state() == "Paused"
    await api.resume()
    assert await api.state() == "Running"
    await api.pause()
    await api.create_snapshot(f"{tmp_path}/state", f"{tmp_path}/mem")
    assert os.path.getsize(tmp_path / "mem") == 16 * MIB
    await vmm.end()

    woken = await Vmm(tmp_path, "woken").listening()
    try:
        woken.config()
        await woken.api.load_snapshot(f"{tmp_path}/state", f"{tmp_path}/mem")
        assert await woken.api.state() == "Paused"
        await woken.api.resume()
        assert await woken.api.state() == "Running"
    finally:
        await woken.end()


async def test_the_vmm_reports_the_configuration_that_was_sent(vmm: Vmm) -> None:
    await vmm.api.configure(vmm.config())

    told = msgspec.json.decode(await vmm.api._call("GET", "/vm/config", b"", 5))

    assert told["machine-config"]["vcpu_count"] == 1
    assert told["machine-config"]["mem_size_mib"] == 16
    assert told["boot-source"]["boot_args"] == "reboot=k panic=1"
    assert told["boot-source"]["initrd_path"] == "initrd"
    assert [drive["drive_id"] for drive in told["drives"]] == ["rootfs", "data"]
    assert [drive["is_read_only"] for drive in told["drives"]] == [True, False]
    assert [drive["cache_type"] for drive in told["drives"]] == ["Unsafe", "Writeback"]
    assert told["network-interfaces"][0]["host_dev_name"] == TAP
    assert told["network-interfaces"][0]["guest_mac"] == MAC
    assert told["vsock"]["uds_path"] == "v.sock"
    assert told["vsock"]["guest_cid"] == 3


async def test_repeating_pause_and_resume_is_success(vmm: Vmm) -> None:
    await running(vmm)

    for _ in range(2):
        await vmm.api.pause()
    for _ in range(2):
        await vmm.api.resume()


async def test_concurrent_calls_are_sent_one_after_the_other(vmm: Vmm) -> None:
    states = await asyncio.gather(*(vmm.api.state() for _ in range(20)))

    assert states == ["Not started"] * 20


async def test_a_closed_client_reconnects(vmm: Vmm) -> None:
    await vmm.api.state()
    await vmm.api.close()

    assert await vmm.api.state() == "Not started"


# -- by version -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "unknown"),
    [
        ("/serial", SerialDevice("serial"), "Invalid request method and/or path"),
        (
            "/snapshot/load",
            SnapshotLoad("s", MemoryBackend("File", "m"), resume_vm=False, clock_realtime=True),
            "unknown field `clock_realtime`",
        ),
    ],
    ids=["serial", "clock_realtime"],
)
async def test_a_field_of_a_later_version_is_refused_by_this_one(
    vmm: Vmm, path: str, body: Body, unknown: str
) -> None:
    failure = await refused(vmm, "PUT", path, body)

    assert isinstance(failure, HostFault)
    assert unknown in failure.message


# -- refusals -------------------------------------------------------------------------------------

BEFORE_START = [
    ("PUT", "/actions", START, HostFault, "without kernel configuration"),
    ("PATCH", "/vm", VmState("Paused"), Conflict, "before starting the microVM"),
    ("PATCH", "/vm", VmState("Resumed"), Conflict, "before starting the microVM"),
    ("PUT", "/snapshot/create", SnapshotCreate("Full", "s", "m"), Conflict, "before starting"),
    ("PUT", "/actions", Action("SendCtrlAltDel"), Conflict, "before starting the microVM"),
    ("PUT", "/machine-config", MachineConfiguration(0, 16), HostFault, "number of vCPUs"),
    ("PUT", "/machine-config", MachineConfiguration(33, 16), HostFault, "number of vCPUs"),
    ("PUT", "/machine-config", MachineConfiguration(1, 0), HostFault, "memory size"),
    ("PUT", "/boot-source", BootSource("nope", ""), HostFault, "(os error 2)"),
    ("PUT", "/boot-source", BootSource("vmlinux", "", "nope"), HostFault, "(os error 2)"),
    ("PUT", "/drives/a", Drive("a", "nope", False, True), HostFault, "(os error 2)"),
    ("PUT", "/drives/b.c", Drive("b.c", "data", False, True), HostFault, "alphanumeric"),
    ("PUT", "/drives/a", Drive("b", "data", False, True), HostFault, "does not match"),
    ("PUT", "/network-interfaces/e", NetworkInterface("e", "lo", MAC), HostFault, "(os error 22)"),
    ("PUT", "/network-interfaces/e", NetworkInterface("e", TAP, "x"), HostFault, "MAC address"),
    ("PUT", "/vsock", Vsock(3, "no/v.sock"), HostFault, "(os error 2)"),
    ("PUT", "/vsock", Vsock(3, "taken"), HostFault, "(os error 98)"),
]


@pytest.mark.parametrize(("method", "path", "body", "kind", "words"), BEFORE_START)
async def test_a_refusal_is_typed_quoted_and_leaves_the_vmm_usable(
    vmm: Vmm, method: str, path: str, body: Body, kind: type[Failure], words: str
) -> None:
    vmm.config()
    (vmm.home / "taken").touch()

    failure = await refused(vmm, method, path, body)

    assert type(failure) is kind
    assert words in failure.message
    assert failure.detail["http_status"] == 400
    assert await vmm.api.state() == "Not started"


async def test_a_refused_part_of_a_configuration_is_named_and_the_vmm_is_usable(vmm: Vmm) -> None:
    config = vmm.config()

    with pytest.raises(Failure, match="PUT /boot-source"):
        await vmm.api.configure(replace(config, kernel="nowhere"))

    assert await vmm.api.state() == "Not started"
    await vmm.api.configure(config)
    await vmm.api.start()
    assert await vmm.api.state() == "Running"


async def test_a_tap_that_another_vmm_holds_is_unavailable(tmp_path: Path, vmm: Vmm) -> None:
    await vmm.api.configure(vmm.config())
    other = await Vmm(tmp_path, "other").listening()
    try:
        failure = await refused(
            other, "PUT", "/network-interfaces/e", NetworkInterface("e", TAP, MAC)
        )
    finally:
        await other.end()

    assert isinstance(failure, Unavailable)
    assert failure.detail["errno"] == "EBUSY"


AFTER_START = [
    ("PUT", "/actions", START),
    ("PUT", "/machine-config", MachineConfiguration(1, 16)),
    ("PUT", "/boot-source", BootSource("vmlinux", "")),
    ("PUT", "/drives/a", Drive("a", "data", False, True)),
    ("PUT", "/network-interfaces/e", NetworkInterface("e", TAP, MAC)),
    ("PUT", "/vsock", Vsock(3, "v2")),
    ("PUT", "/snapshot/load", SnapshotLoad("s", MemoryBackend("File", "m"), resume_vm=False)),
]


@pytest.mark.parametrize(("method", "path", "body"), AFTER_START)
async def test_what_belongs_before_the_start_is_a_conflict_after_it(
    vmm: Vmm, method: str, path: str, body: Body
) -> None:
    await running(vmm)

    assert isinstance(await refused(vmm, method, path, body), Conflict)
    assert await vmm.api.state() == "Running"


@pytest.mark.parametrize(
    "content", [b"no elf", b"\x7fELF\x02\x01\x01", b""], ids=["text", "cut", "empty"]
)
async def test_an_invalid_kernel_fails_the_start_and_not_the_vmm(vmm: Vmm, content: bytes) -> None:
    config = vmm.config()
    (vmm.home / "vmlinux").write_bytes(content)
    await vmm.api.configure(config)

    with pytest.raises(Invalid, match="Cannot load kernel"):
        await vmm.api.start()

    assert await vmm.api.state() == "Not started"


async def test_a_fault_of_the_http_itself_is_decoded_despite_its_raw_newline(
    vmm: Vmm,
) -> None:
    with pytest.raises(HostFault, match="All previous unanswered requests") as failure:
        await vmm.api._call("POST", "/", b"", 5)

    assert "\n" not in failure.value.message
    assert await vmm.api.state() == "Not started"


async def test_an_unknown_field_is_refused_so_a_typing_error_cannot_pass(vmm: Vmm) -> None:
    body = b'{"vcpu_count": 1, "mem_size_mib": 16, "zzz": 1}'

    with pytest.raises(HostFault, match="unknown field `zzz`"):
        await vmm.api._call("PUT", "/machine-config", body, 5)


# -- snapshots that go wrong ----------------------------------------------------------------------


async def test_create_while_running_is_refused(tmp_path: Path, vmm: Vmm) -> None:
    await running(vmm)

    with pytest.raises(HostFault, match="unavailable while running"):
        await vmm.api.create_snapshot(f"{tmp_path}/s", f"{tmp_path}/m")


async def test_a_full_disk_is_exhausted_and_the_vm_stays_paused_and_can_go_on(
    tmp_path: Path, vmm: Vmm
) -> None:
    await running(vmm)
    await vmm.api.pause()
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "hostd-test", small], check=True)
    try:
        with pytest.raises(Exhausted) as failure:
            await vmm.api.create_snapshot(f"{small}/s", f"{small}/m")

        assert failure.value.detail["errno"] == "ENOSPC"
        assert await vmm.api.state() == "Paused"
        await vmm.api.resume()
        assert await vmm.api.state() == "Running"
    finally:
        subprocess.run(["umount", "-l", small], check=True)


async def snapshot(vmm: Vmm, directory: Path) -> tuple[Path, Path]:
    """A good snapshot, its VMM ended."""
    await running(vmm)
    await vmm.api.pause()
    state, mem = directory / "state", directory / "mem"
    await vmm.api.create_snapshot(str(state), str(mem))
    await vmm.end()
    return state, mem


@pytest.mark.parametrize("fault", ["no state", "bit", "half memory", "no memory", "no tap"])
async def test_a_failed_load_is_reported_and_the_vmm_exits_with_1(
    tmp_path: Path, vmm: Vmm, fault: str
) -> None:
    state, mem = await snapshot(vmm, tmp_path)
    match fault:
        case "no state":
            state.unlink()
        case "bit":
            content = bytearray(state.read_bytes())
            content[len(content) // 2] ^= 1
            state.write_bytes(content)
        case "half memory":
            os.truncate(mem, 8 * MIB)
        case "no memory":
            mem.unlink()
        case _:
            subprocess.run(["ip", "link", "delete", TAP], check=True)
            subprocess.run(["ip", "link", "add", TAP, "type", "bridge"], check=True)
    woken = await Vmm(tmp_path, "woken").listening()
    woken.config()

    try:
        with pytest.raises(HostFault, match="Load snapshot error"):
            await woken.api.load_snapshot(str(state), str(mem))

        assert await asyncio.to_thread(woken.process.wait, 5) == 1
    finally:
        await woken.end()


async def test_a_load_after_boot_configuration_is_a_conflict_and_the_vmm_survives(
    tmp_path: Path, vmm: Vmm
) -> None:
    state, mem = await snapshot(vmm, tmp_path)
    woken = await Vmm(tmp_path, "woken").listening()
    try:
        await woken.api.configure(woken.config())

        with pytest.raises(Conflict, match="not allowed after configuring"):
            await woken.api.load_snapshot(str(state), str(mem))

        assert await woken.api.state() == "Not started"
    finally:
        await woken.end()


# -- ends and silences ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [payload.RESET, payload.CRASH], ids=["reset", "triple fault"])
async def test_the_vmm_of_a_guest_that_resets_or_crashes_exits_with_0(
    vmm: Vmm, code: bytes
) -> None:
    await vmm.api.configure(vmm.config(code))

    await vmm.api.start()

    assert await asyncio.to_thread(vmm.process.wait, 10) == 0
    with pytest.raises(Unavailable):
        await vmm.api.state()


async def test_a_vmm_that_is_killed_makes_calls_unavailable(vmm: Vmm) -> None:
    await vmm.api.state()
    vmm.process.kill()
    vmm.process.wait()

    for _ in range(2):
        with pytest.raises(Unavailable, match="gone"):
            await vmm.api.state()


async def test_a_vmm_that_hangs_is_unavailable_in_time_and_usable_once_it_goes_on(
    vmm: Vmm,
) -> None:
    hasty = VmmApi(str(vmm.home), timeout_s=0.1, snapshot_timeout_s=0.1)
    vmm.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable, match=r"within 0\.1 s"):
            await hasty.state()
    finally:
        vmm.process.send_signal(signal.SIGCONT)
        await hasty.close()

    assert await vmm.api.state() == "Not started"


async def test_a_cancelled_call_does_not_spoil_the_next(vmm: Vmm) -> None:
    vmm.process.send_signal(signal.SIGSTOP)
    try:
        call = asyncio.create_task(vmm.api.state())
        done, _ = await asyncio.wait([call], timeout=0.05)
        assert not done
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    finally:
        vmm.process.send_signal(signal.SIGCONT)

    assert (await vmm.api.info()).id == "c1"
