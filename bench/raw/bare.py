"""The bare script that hostd is measured against: jailer, Firecracker's API, guest agent, kernel.

The same calls with the same binaries and files as hostd's, and what leaves the same lasting
result: a sleep's files are synced, an ended VMM leaves no TAP, cgroup or jail. Nothing else: no
journal, bus, checks or hashes, plain blocking calls. It waits between attempts as hostd does.
Standard library only. As a program it reads one job per line (JSON) from stdin and writes one line
for each: duration, phases and its own CPU time, or its error. What a job has to make before is in
its CPU time and not in its duration, which begins once the kernel has settled.

Source: tun(4), cgroups(7), rtnetlink(7), pidfd_open(2); docs/{jailer,vsock}.md of Firecracker.
"""

import contextlib
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLL_S, LAST_WAIT_S, GROWTH = 0.0005, 0.1, 1.25  # as hostd asks a guest's agent
STEADY_S = 0.004  # the API listens within 1 to 2 ms: for so long it is not asked less often
SETTLE_S = 0.2  # from what was made to the launch, as when it was made well beforehand
LIMIT_S = 30.0
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
TAP_FLAGS = 0x5002  # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
CONTROLLERS = "+cpu +memory +pids"
NETLINK_ROUTE, NLMSG_ERROR = 0, 2
INDEX_AT = 20  # of an interface, in messages about links and neighbours


class Phases:
    """How long each part of a job took; a part that comes twice counts together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def done(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def run(job: dict[str, Any]) -> dict[str, float]:
    """One operation; each part is optional. Returns its phases.

    `drain`: requests to the agent of the running guest. `jailer`: its command line. `calls`: of the
    API. `agent`: requests until the guest answers. `keep`: where state and memory are moved and
    synced. `end`: how the VMM ends, and what is removed with it.
    """
    phases = Phases()
    root = Path(job["root"])
    for request in job.get("drain", ()):
        _ask(root / "v.sock", request)
    phases.done("drain")
    if job.get("jailer"):
        _run_jailer(job["jailer"])
        phases.done("jailer")
    with _connected(root / "api.sock") as api:
        phases.done("api")
        for method, path, body in job["calls"]:
            _call(api, method, path, body)
            phases.done(f"{method} {path}")
    for request in job.get("agent", ()):
        _ask(root / "v.sock", request)
        phases.done("agent")
    if "keep" in job:
        _keep(root, Path(job["keep"]))
        phases.done("sync")
    if "end" in job:
        _end(root, job["end"], phases)
    return phases.seconds


def make(launch: dict[str, Any]) -> None:
    """What a launch needs, as hostd leaves it, each thing made once: no checks, no read-back, no
    metadata, no pin."""
    _make_cgroup(launch["cgroup"], launch["limits"])
    _make_jail(launch["root"], launch["uid"], launch)
    _make_tap(launch["tap"], launch["uid"], launch["messages"])


def _make_cgroup(leaf: str, limits: dict[str, str]) -> None:
    try:
        os.mkdir(leaf)
    except FileNotFoundError:  # the tenant's first
        os.mkdir(tenant := os.path.dirname(leaf))
        if limits:
            _write(f"{tenant}/cgroup.subtree_control", CONTROLLERS)
        os.mkdir(leaf)
    for name, value in limits.items():
        _write(f"{leaf}/{name}", value)


def _make_jail(root: str, uid: int, launch: dict[str, Any]) -> None:
    os.mkdir(os.path.dirname(root), 0o700)
    os.mkdir(root, 0o700)
    for name, source in launch["links"].items():
        os.link(source, f"{root}/{name}")
    for source in launch["writable"]:
        os.chmod(source, 0o600)
        os.chown(source, uid, uid)
    for name in launch["empty"]:
        descriptor = os.open(f"{root}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchown(descriptor, uid, uid)
        os.close(descriptor)
    for name, image in launch["images"].items():
        _copy_sparse(image, f"{root}/{name}")
    for name, files in launch["snapshot"].items():
        os.mkdir(f"{root}/{name}", 0o750)
        os.chown(f"{root}/{name}", 0, uid)
        for file in files:
            os.chown(file, 0, uid)
            os.chmod(file, 0o440)
            os.link(file, f"{root}/{name}/{os.path.basename(file)}")
    os.chown(root, uid, uid)


def _copy_sparse(source: str, target: str) -> None:
    image = os.open(source, os.O_RDONLY)
    copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    try:
        os.ftruncate(copy, size := os.fstat(image).st_size)
        at = 0
        while at < size:
            try:
                at = os.lseek(image, at, os.SEEK_DATA)
            except OSError:  # no more data
                return
            end = os.lseek(image, at, os.SEEK_HOLE)
            os.pwrite(copy, os.pread(image, end - at, at), at)
            at = end
    finally:
        os.close(copy)
        os.close(image)


def _make_tap(name: str, uid: int, messages: list[tuple[str, bool]]) -> None:
    """`messages` in hex, and whether each is to be about the new interface."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
        index = socket.if_nametoindex(name)
        _write(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")
        requests: list[bytes] = []
        for text, own in messages:
            request = bytearray.fromhex(text)
            if own:
                struct.pack_into("=i", request, INDEX_AT, index)
            requests.append(bytes(request))
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as kernel:
            kernel.send(b"".join(requests))
            for _request in requests:
                kind, code = struct.unpack_from("=4xH10xi", kernel.recv(65536))
                if kind != NLMSG_ERROR or code:
                    raise OSError(-code, f"rtnetlink refused a message about {name}")
        fcntl.ioctl(descriptor, TUNSETOWNER, uid)
        fcntl.ioctl(descriptor, TUNSETPERSIST, 1)
    finally:
        os.close(descriptor)


def _write(path: str, value: str) -> None:
    """A setting of the kernel's, if it has it."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)


def _keep(root: Path, directory: Path) -> None:
    """Move the VMM's files out of the jail; they survive a power loss when this returns."""
    for name in ("state", "mem"):
        os.rename(root / name, directory / name)
        _sync(directory / name)
    _sync(directory)
    _sync(root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _end(root: Path, end: dict[str, Any], phases: Phases) -> None:
    """Kill the VMM, or wait until it has exited; remove its TAP, cgroup, jail and snapshot."""
    pid = int((root / "firecracker.pid").read_text(encoding="ascii"))
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            if end["kill"]:
                signal.pidfd_send_signal(process, signal.SIGKILL)
            poll = select.poll()
            poll.register(process, select.POLLIN)
            if not poll.poll(LIMIT_S * 1000):
                raise RuntimeError(f"VMM {pid} still runs after {LIMIT_S:g} s")
        finally:
            os.close(process)
    phases.done("exit")
    _delete_tap(end["tap"])
    phases.done("tap")
    _remove_cgroup(end["cgroup"])
    phases.done("cgroup")
    shutil.rmtree(end["jail"])
    phases.done("jail")
    if end.get("snapshot"):
        shutil.rmtree(end["snapshot"])
        phases.done("discard")


def _delete_tap(name: str) -> None:
    """It ends with its last descriptor, as it is not persistent any more."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
        fcntl.ioctl(descriptor, TUNSETPERSIST, 0)
    finally:
        os.close(descriptor)


def _remove_cgroup(path: str) -> None:
    """The kernel's own threads of a VM leave it shortly after the VM's process."""
    until = time.monotonic() + LIMIT_S
    while True:
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
        else:
            return
        time.sleep(POLL_S)


def _run_jailer(argv: list[str]) -> None:
    pid = os.posix_spawn(argv[0], argv, {})
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"jailer exited with wait status {status}")


def _connected(path: Path) -> socket.socket:
    until = time.monotonic() + LIMIT_S
    directory = os.open(path.parent, os.O_PATH)  # a path through it has no length limit
    waits = _waits(STEADY_S)
    try:
        while True:
            stream = socket.socket(socket.AF_UNIX)
            stream.settimeout(LIMIT_S)
            try:
                stream.connect(f"/proc/self/fd/{directory}/{path.name}")
            except OSError:
                stream.close()
                if time.monotonic() > until:
                    raise
                time.sleep(next(waits))
            else:
                return stream
    finally:
        os.close(directory)


def _waits(steady_s: float = 0.0) -> Iterator[float]:
    """Before each further attempt; longer and longer once they are `steady_s` together."""
    wait_s, waited_s = POLL_S, 0.0
    while True:
        yield wait_s
        waited_s += wait_s
        if waited_s > steady_s:
            wait_s = min(wait_s * GROWTH, LAST_WAIT_S)


def _call(api: socket.socket, method: str, path: str, body: object) -> None:
    data = json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    api.sendall(head.encode() + data)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += api.recv(65536) or _closed()
    if not answer.startswith((b"HTTP/1.1 204", b"HTTP/1.1 200")):
        raise RuntimeError(f"{method} {path}: {answer.decode(errors='replace')}")


def _ask(path: Path, request: object) -> None:
    """Retry until the guest answers; while it boots, connections are closed."""
    until = time.monotonic() + LIMIT_S
    body = json.dumps(request).encode()
    waits = _waits()
    while True:
        try:
            with _connected(path) as stream:
                stream.settimeout(0.25)
                stream.sendall(b"CONNECT 5252\n")
                while _exactly(stream, 1) != b"\n":
                    pass
                stream.sendall(struct.pack(">I", len(body)) + body)
                (size,) = struct.unpack(">I", _exactly(stream, 4))
                _exactly(stream, size)
                return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(next(waits))


def _exactly(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += stream.recv(size - len(data)) or _closed()
    return data


def _closed() -> bytes:
    raise ConnectionResetError("closed")


def main() -> None:
    """One job per line; `at` in the answer is CLOCK_MONOTONIC, common to all processes."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        used = time.process_time()
        try:
            job = json.loads(line)
            if "make" in job:
                make(job["make"])
                time.sleep(SETTLE_S)
            began = time.monotonic()
            phases = run(job)
            now = time.monotonic()
            answer: dict[str, object] = {"took_s": now - began, "at": now, "phases": phases}
            answer["cpu_s"] = time.process_time() - used
        except (OSError, RuntimeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
