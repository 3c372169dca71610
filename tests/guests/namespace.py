"""A network namespace of a test's own, with one TAP in it, gone at the end of its `with`."""

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Generator
from typing import Self

from handlers.host.linux import file_threads
from handlers.host.linux.call_threads import CallThreads
from handlers.host.linux.kernel_thread import nothing
from schemas.settings import IMPORTS_MAX
from tests.guests import traffic
from worker.demo.netns import enter_new_network

CLONE_NEWNET = 0x40000000
TAP = "tap0"
HOST_IP = "10.77.0.1"
GUEST_IP = "10.77.0.2"
FILE_THREADS = {
    "_quick": file_threads.QUICK_THREADS,
    "_slow": file_threads.SLOW_THREADS,
    "_imports": IMPORTS_MAX,
}
BOOT_ARGS = f"reboot=k panic=1 ip={GUEST_IP}::{HOST_IP}:255.255.255.0::eth0:off"


@contextlib.contextmanager
def own_network() -> Generator[None]:
    """This thread, and what it starts, is in a new network namespace inside the `with`."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_new_network()
        try:
            with own_file_threads():
                yield
        finally:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(home, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns to the namespace before")
    finally:
        os.close(home)


@contextlib.contextmanager
def own_file_threads() -> Generator[None]:
    """File work is in threads begun inside the `with`: those of before stay in the namespace they
    were begun in, and so would a jailer that one of them executes."""
    before = {name: getattr(file_threads, name) for name in FILE_THREADS}
    for name, count in FILE_THREADS.items():
        kind = before[name].kind
        own = CallThreads(
            kind, limit_s=file_threads.CALL_S, open=nothing, close=lambda _: None, count=count
        )
        setattr(file_threads, name, own)
    try:
        yield
    finally:
        for name, threads in before.items():
            getattr(file_threads, name).stop()
            setattr(file_threads, name, threads)


class TestNamespace:
    """`tap0` is up and carries HOST_IP/24; nothing leads out."""

    __test__ = False  # not a test class

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Self:
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        for command in (
            "link set lo up",
            f"tuntap add {TAP} mode tap",
            f"addr add {HOST_IP}/24 dev {TAP}",
            f"link set {TAP} up",
        ):
            subprocess.run(["ip", "-n", self.name, *command.split()], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=True)

    @contextlib.contextmanager
    def entered(self) -> Generator[None]:
        """This thread is in the namespace inside the `with`; sockets made there stay in it."""
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            if libc.setns(there, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {self.name}")
            try:
                yield
            finally:
                libc.setns(home, CLONE_NEWNET)
        finally:
            os.close(there)
            os.close(home)

    def udp_echo(self, payload: bytes, timeout_s: float = 3.0) -> bytes:
        """What comes back from the guest's UDP port 7."""
        with self.entered():
            return traffic.udp_echo(GUEST_IP, payload, timeout_s)

    def tcp_connect(self, timeout_s: float = 3.0) -> socket.socket:
        """A stream to the guest's TCP port 7."""
        with self.entered():
            return traffic.tcp_connect(GUEST_IP, timeout_s)

    def ping(self, timeout_s: float = 2.0) -> bool:
        """Whether the guest answers one ICMP echo request."""
        with self.entered():
            return traffic.ping(GUEST_IP, timeout_s)
