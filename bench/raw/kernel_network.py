"""What the kernel takes for a network beside many others: prepared messages, nothing else.

A namespace of its own with as many bridges, TAPs and elements of hostd's rules as the measured
host has, and no hostd in it. A network is made and removed by the messages that hostd sends and
the settings that it writes, without its reads; all are made up before the clock starts.
"""

import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from handlers.host.net.antispoof import pin_members
from handlers.host.net.bridges import GATEWAY_OFFSET, SYSCTLS
from handlers.host.net.chains import base_script
from handlers.host.net.netlink_messages import NLMSG_ERROR, messages
from handlers.host.net.nft.commits import NETLINK_NETFILTER, read_generation
from handlers.host.net.nft.elements import Member, change_batch, change_result
from handlers.host.net.nft.nftables import guard_of, spelled
from handlers.host.net.rtnetlink_messages import link_change, new_address, new_bridge, no_link
from handlers.host.net.rtnetlink_reader import Address, error_of
from handlers.host.net.sysctl import ROOT
from handlers.host.net.tenant_rules import tenant_members
from handlers.specs import TenantRulesSpec
from schemas import naming
from schemas.requests import TenantNet
from tests.kernel.net.netns import Namespace
from tests.kernel.net.plans import GuestPlan, net_of

NET = net_of(60)
FIRST_NET_ID, FIRST_OFFSET, MAX_FLOWS = 100, 10, 16_384
ALIAS = naming.interface_alias("floor")
RECEIVE_BYTES = 1 << 16
WITHOUT_IPV6 = "ipv6/conf/default/disable_ipv6"


@dataclass(frozen=True, slots=True)
class Taken:
    """Milliseconds of one piece of work: until it was done, and CPU of the thread that asked."""

    wall_ms: list[float] = field(default_factory=list[float])
    cpu_ms: list[float] = field(default_factory=list[float])

    def timed(self, work: Callable[[], None]) -> None:
        began, cpu = time.perf_counter_ns(), time.thread_time_ns()
        work()
        self.cpu_ms.append((time.thread_time_ns() - cpu) / 1e6)
        self.wall_ms.append((time.perf_counter_ns() - began) / 1e6)


class KernelNetwork:
    """A namespace with `networks` bridges, the first of them with `each` TAPs, `taps` in all."""

    def __init__(self, networks: int, taps: int, each: int) -> None:
        self.made, self.removed = Taken(), Taken()
        self._namespace = Namespace()
        try:
            self._fill(networks, taps, each)
            self._links, self._rules = self._namespace.run(open_sockets)
        except BaseException:
            self._namespace.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._links.close()
        self._rules.close()
        self._namespace.close()

    def clear(self) -> None:
        """Forget what was measured so far."""
        self.made, self.removed = Taken(), Taken()

    def measure(self) -> None:
        """Make a network and remove it, once more."""
        self._namespace.run(self._measure)

    def _measure(self) -> None:
        members = both(tenant_members(TenantRulesSpec("floor", NET).key))
        index = 0

        def make() -> None:
            nonlocal index
            commit(self._rules, batch)
            confirm(self._links, [bridge])
            for path, value in settings:
                write(path, value)
            index = socket.if_nametoindex(NET.bridge_name)
            confirm(self._links, going_up(index))

        def remove() -> None:
            confirm(self._links, [gone])
            commit(self._rules, batch)

        mac = naming.mac_address(NET.tenant_net_id, GATEWAY_OFFSET)
        bridge = new_bridge(NET.bridge_name, mac).with_header(1)
        settings = [
            (f"{ROOT}/{name.format(NET.bridge_name)}", value.encode())
            for name, value in SYSCTLS.items()
        ]
        batch = change_batch([], members, read_generation())
        self.made.timed(make)
        gone = no_link(index, frozenset()).with_header(1)
        batch = change_batch(members, [], read_generation())
        self.removed.timed(remove)

    def _fill(self, networks: int, taps: int, each: int) -> None:
        guard = base_script(MAX_FLOWS, guard=True).replace("  flags owner;\n", "")
        members: list[Member] = []
        links: list[str] = []
        for number in range(networks):
            net = net_of(FIRST_NET_ID + number)
            members += tenant_members(TenantRulesSpec(f"t-{number}", net).key)
            links += bridge_lines(net)
            for offset in range(FIRST_OFFSET, FIRST_OFFSET + min(each, taps - number * each)):
                guest = GuestPlan(f"t-{number}", net, offset)
                members += pin_members(guest.pin.key)
                links += [f"tuntap add {guest.tap} mode tap"]
                links += [f"link set {guest.tap} master {net.bridge_name} up"]
        elements = "".join(f"add element {spelled(member)}\n" for member in both(members))
        self._namespace.nft(base_script(MAX_FLOWS) + guard + elements)
        # As hostd's links are: with IPv6, each would have routes that a deletion walks, too.
        self._namespace.sysctl(WITHOUT_IPV6, "1")
        self._namespace.command("ip", "-batch", "-", text="\n".join(links))
        self._namespace.sysctl(WITHOUT_IPV6, "0")


def bridge_lines(net: TenantNet) -> Sequence[str]:
    """A network's bridge for `ip -batch`."""
    options = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
    return (
        f"link add {net.bridge_name} {options}",
        f"addr add {net.gateway_ip}/{naming.prefix_len(net)} dev {net.bridge_name}",
        f"link set {net.bridge_name} up",
    )


def both(members: Sequence[Member]) -> list[Member]:
    """The members of hostd's tables and of the guard's."""
    return [(copy, element) for name, element in members for copy in (name, guard_of(name))]


def open_sockets() -> tuple[socket.socket, socket.socket]:
    """For rtnetlink and nf_tables, of the calling thread's namespace."""
    links = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    rules = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    for each in (links, rules):
        each.bind((0, 0))
    return links, rules


def going_up(index: int) -> list[bytes]:
    address = new_address(index, Address(NET.gateway_ip, naming.prefix_len(NET)))
    up = link_change(index, state="up", ifalias=ALIAS)
    return [address.with_header(1), up.with_header(2)]


def confirm(links: socket.socket, requests: Sequence[bytes]) -> None:
    """Send requests in one go; raises if the kernel refuses one."""
    links.send(b"".join(requests))
    answers = 0
    while answers < len(requests):
        for kind, _flags, _sequence, body in messages(links.recv(RECEIVE_BYTES)):
            answers += kind == NLMSG_ERROR
            if kind == NLMSG_ERROR and (code := error_of(body)):
                raise OSError(code, os.strerror(code))


def commit(rules: socket.socket, batch: bytes) -> None:
    """One transaction of nf_tables, whose answer is there when the sending returns."""
    rules.send(batch)
    code = change_result([rules.recv(RECEIVE_BYTES)])
    with suppress(BlockingIOError):
        while True:
            rules.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
    if code:
        raise OSError(code, os.strerror(code))


def write(path: str, value: bytes) -> None:
    """A setting, if this kernel has it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return
    try:
        os.write(descriptor, value)
    finally:
        os.close(descriptor)
