"""Network namespaces of a test's own: nothing of the machine's links, routes or rules is touched.

A namespace here has no name and no file: it lives by a descriptor and the thread that is in it, so
it is gone with the test even if that is killed. `HostNet` is a host with an uplink to an outside;
`TapGuest` plays the guest behind a TAP, frame by frame.
"""

import ctypes
import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Self, TypeVar

import pytest

from handlers.host.net.host_network import NetworkMechanisms, open_network_mechanisms
from handlers.host.net.rtnetlink_reader import Link
from handlers.host.net.taps import FLAGS, open_tap
from schemas.settings import NetworkSettings

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
ETH_P_ALL = 0x0003
VNET_HDR = bytes(10)
DEADLINE_S = 5.0
UPLINK, OUTSIDE, INTERNET, METADATA = (
    "198.51.100.1",
    "198.51.100.2",
    "203.0.113.5",
    "169.254.169.254",
)

libc = ctypes.CDLL(None, use_errno=True)


def need_root() -> None:
    """Skip without the right to make namespaces; in CI that is a failure."""
    if os.geteuid() == 0 and os.path.exists("/dev/net/tun"):
        return
    if os.environ.get("CI"):
        pytest.fail("kernel tests need root and /dev/net/tun")
    pytest.skip("kernel tests need root and /dev/net/tun")


class Namespace:
    """A network namespace and one thread that is in it."""

    def __init__(self) -> None:
        need_root()
        self._pool = ThreadPoolExecutor(1, initializer=unshare)
        self.descriptor = self.run(
            lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        )
        self.ip("link set lo up")

    def run(self, do: Callable[[], T]) -> T:
        return self._pool.submit(do).result()

    def enter(self) -> None:
        """Bring the calling thread into this namespace, for good."""
        if libc.setns(self.descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    def command(self, *words: str, text: str | None = None) -> str:
        done = self.run(
            lambda: subprocess.run(
                words, input=text, capture_output=True, text=True, timeout=20, check=False
            )
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def ip(self, line: str) -> str:
        return self.command("ip", *line.split())

    def nft(self, text: str) -> None:
        self.command("nft", "-f", "-", text=text)

    def ruleset(self, *options: str) -> str:
        """All tables in the order of their names, without the name of the program that owns one."""
        listed = re.sub(
            r" # progname .*", "", self.command("nft", "-s", *options, "list", "ruleset")
        )
        return "".join(sorted(re.findall(r"^table .*?^}\n", listed, re.DOTALL | re.MULTILINE)))

    def sysctl(self, name: str, value: str | None = None) -> str:
        def access() -> str:
            path = f"/proc/sys/net/{name}"
            if value is not None:
                with open(path, "w", encoding="ascii") as file:
                    file.write(value)
            with open(path, encoding="ascii") as file:
                return file.read().strip()

        return self.run(access)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        os.close(self.descriptor)


class HostNet:
    """A host namespace with an uplink to an outside one, and the mechanisms at work in it."""

    def __init__(self, settings: NetworkSettings | None = None) -> None:
        with ExitStack() as made:
            self.host = Namespace()
            made.callback(self.host.close)
            self.outside = Namespace()
            made.callback(self.outside.close)
            peer = f"/proc/{os.getpid()}/fd/{self.outside.descriptor}"
            self.host.ip(f"link add up0 type veth peer name eth0 netns {peer}")
            self.host.ip(f"addr add {UPLINK}/24 dev up0")
            self.host.ip("link set up0 up")
            for address, link in ((f"{OUTSIDE}/24", "eth0"), (INTERNET, "lo"), (METADATA, "lo")):
                self.outside.ip(f"addr add {address} dev {link}")
            self.outside.ip("link set eth0 up")
            self.outside.ip(f"route add 10.240.0.0/12 via {UPLINK}")
            self.host.ip(f"route add default via {OUTSIDE}")
            self.mechanisms = self.open(settings or NetworkSettings())
            made.callback(self._close_mechanisms)
            self._made = made.pop_all()

    def open(self, settings: NetworkSettings) -> NetworkMechanisms:
        """Mechanisms in the host namespace; the caller closes them."""
        return open_network_mechanisms(settings, self.host.enter)

    def reopen(self, settings: NetworkSettings) -> NetworkMechanisms:
        """As after a restart of the worker, maybe with other settings."""
        self.mechanisms.close()
        self.mechanisms = self.open(settings)
        return self.mechanisms

    async def link(self, name: str) -> Link | None:
        return await self.mechanisms.netlink.run(lambda kernel: kernel.link(name))

    def _close_mechanisms(self) -> None:
        self.mechanisms.close()

    def close(self) -> None:
        self._made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sniffer:
    """All that is seen at one place, kept until asked for."""

    def __init__(self, descriptor: int, cut: int = 0) -> None:
        self.descriptor = descriptor
        self._cut = cut
        self.frames: list[bytes] = []

    def wait_for(self, token: bytes, timeout_s: float = DEADLINE_S) -> bytes | None:
        """The first frame with the token, those before it included in `frames`; None: too late."""
        deadline = time.monotonic() + timeout_s
        while True:
            for frame in self.frames:
                if token in frame:
                    return frame
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.descriptor], [], [], left)[0]:
                return None
            self.frames.append(os.read(self.descriptor, 65536)[self._cut :])

    def saw(self, token: bytes) -> bool:
        """Whether it has come by now."""
        return self.wait_for(token, 0) is not None


class TapGuest(Sniffer):
    """The guest's end of a TAP: what it sends goes through the bridge, what it gets is kept."""

    def __init__(self, net: HostNet, tap: str) -> None:
        self._net = net
        super().__init__(net.host.run(lambda: open_tap(tap, FLAGS)), cut=len(VNET_HDR))
        deadline = time.monotonic() + DEADLINE_S
        while self._state(tap) != "forwarding":
            assert time.monotonic() < deadline, f"{tap} does not forward"

    def _state(self, tap: str) -> str:
        return (
            self._net.host.command("bridge", "link", "show", "dev", tap)
            .split("state ")[1]
            .split()[0]
        )

    def send(self, frame: bytes) -> None:
        os.write(self.descriptor, VNET_HDR + frame)

    def close(self) -> None:
        os.close(self.descriptor)


def unshare() -> None:
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def packet_socket(namespace: Namespace, link: str, protocol: int = ETH_P_ALL) -> socket.socket:
    def opened() -> socket.socket:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
        raw.bind((link, protocol))
        return raw

    return namespace.run(opened)


def udp_socket(namespace: Namespace, port: int, address: str = "0.0.0.0") -> socket.socket:
    def opened() -> socket.socket:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        udp.bind((address, port))
        udp.settimeout(DEADLINE_S)
        return udp

    return namespace.run(opened)
