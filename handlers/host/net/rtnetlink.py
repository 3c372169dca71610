"""Changes of interfaces, addresses, neighbours, FDB and routes by rtnetlink, and their thread.

A thin typed layer on pyroute2; it knows the kernel's messages and nothing of tenants. Reads are in
`rtnetlink_reader.py`. Never reads /sys/class/net: it shows the namespace that sysfs was mounted in,
not the one the thread is in.
"""

# pyright: reportMissingTypeStubs=false
# (pyroute2 has no types)

import errno
import os
import socket
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from handlers.errors import of_os_error
from handlers.host.linux.kernel_thread import KernelThread, no_namespace
from handlers.host.net.netlink_messages import HEADER, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR
from handlers.host.net.rtnetlink_reader import (
    IFF_UP,
    NUD_NOARP,
    NUD_PERMANENT,
    RT_TABLE_MAIN,
    Address,
    Reader,
    error_of,
)

T = TypeVar("T")

# linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR = 16, 17, 20, 21
RTM_NEWROUTE, RTM_NEWNEIGH, RTM_DELNEIGH = 24, 28, 29
NTF_MASTER = 0x04
RTPROT_KERNEL, RT_SCOPE_LINK, RTN_UNICAST = 2, 253, 1


class Kernel(Reader):
    """rtnetlink of one namespace. Synchronous; lives in one thread.

    pyroute2 spells the messages; they are sent and confirmed on the socket itself, since its own
    round trip takes 0.3 ms and more for what the kernel does in 0.03.

    `unwanted` are the names of the links that hostd removed last: nobody has to be told that these
    are gone.

    Source: rtnetlink(7), ip-link(8), bridge(8). Needs: CAP_NET_ADMIN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unwanted: set[str] = set()

    def add_bridge(self, name: str, mac: str) -> None:
        """A bridge that is down and forwards at once: no STP, no snooping, a MAC that stays."""
        data = {"br_stp_state": 0, "br_forward_delay": 0, "br_mcast_snooping": 0}
        held = [("IFLA_IFNAME", name), ("IFLA_ADDRESS", mac), _info("KIND", "bridge", "DATA", data)]
        with mapping_errors(f"add bridge {name}"):
            self._change(RTM_NEWLINK, ifinfmsg(), held, flags=NLM_F_CREATE | NLM_F_EXCL)

    def set_link(self, index: int, **attributes: Any) -> None:
        """`state`, `master`, `address`, `ifalias` of a link, in one message."""
        state = attributes.get("state")
        held = [(f"IFLA_{n.upper()}", value) for n, value in attributes.items() if n != "state"]
        facts = {"index": index}
        if state is not None:
            facts |= {"flags": IFF_UP if state == "up" else 0, "change": IFF_UP}
        with mapping_errors(f"set {', '.join(attributes)} of link {index}"):
            self._change(RTM_NEWLINK, ifinfmsg(), held, facts)

    def set_bridge(self, index: int, **attributes: int) -> None:
        held = [_info("KIND", "bridge", "DATA", attributes)]
        with mapping_errors(f"set {', '.join(attributes)} of bridge {index}"):
            self._change(RTM_NEWLINK, ifinfmsg(), held, {"index": index})

    def set_port(self, index: int, **attributes: int) -> None:
        """Attributes of a bridge port, e.g. `isolated`; old kernels ignore unknown ones."""
        port = {f"brport_{name}": value for name, value in attributes.items()}
        held = [_info("SLAVE_KIND", "bridge", "SLAVE_DATA", port)]
        with mapping_errors(f"set {', '.join(attributes)} of bridge port {index}"):
            self._change(RTM_NEWLINK, ifinfmsg(), held, {"index": index})

    def delete_link(self, index: int) -> None:
        """Gone already is success. Blocks for 15 to 40 ms: the kernel waits for its readers."""
        with mapping_errors(f"delete link {index}", absent=frozenset({errno.ENODEV})):
            self._change(RTM_DELLINK, ifinfmsg(), [], {"index": index})

    def add_address(self, index: int, address: Address) -> None:
        with mapping_errors(f"add address {address.address}/{address.prefix_len}"):
            self._address(RTM_NEWADDR, index, address, NLM_F_CREATE | NLM_F_REPLACE)

    def delete_address(self, index: int, address: Address) -> None:
        gone = frozenset({errno.EADDRNOTAVAIL, errno.ENODEV})
        with mapping_errors(f"delete address {address.address}/{address.prefix_len}", absent=gone):
            self._address(RTM_DELADDR, index, address, 0)

    def add_neighbour(self, index: int, address: str, mac: str) -> None:
        facts = {"family": socket.AF_INET, "ifindex": index, "state": NUD_PERMANENT}
        held = [("NDA_DST", address), ("NDA_LLADDR", mac)]
        with mapping_errors(f"add neighbour {address}"):
            self._change(RTM_NEWNEIGH, ndmsg(), held, facts, NLM_F_CREATE | NLM_F_REPLACE)

    def delete_neighbour(self, index: int, address: str) -> None:
        gone = frozenset({errno.ENOENT, errno.ENODEV})
        facts = {"family": socket.AF_INET, "ifindex": index}
        with mapping_errors(f"delete neighbour {address}", absent=gone):
            self._change(RTM_DELNEIGH, ndmsg(), [("NDA_DST", address)], facts)

    def add_static_fdb(self, index: int, mac: str) -> None:
        """`bridge fdb replace MAC dev PORT master static`: NUD_PERMANENT would mean the host."""
        facts = {"family": socket.AF_BRIDGE, "ifindex": index, "state": NUD_NOARP}
        facts["flags"] = NTF_MASTER
        held = [("NDA_LLADDR", mac)]
        with mapping_errors(f"add FDB entry {mac}"):
            self._change(RTM_NEWNEIGH, ndmsg(), held, facts, NLM_F_CREATE | NLM_F_REPLACE)

    def add_connected_route(self, index: int, subnet: str, source: str) -> None:
        """What the kernel adds with an address, for when it was deleted."""
        dst, _, prefix_len = subnet.partition("/")
        facts = {
            "family": socket.AF_INET,
            "dst_len": int(prefix_len),
            "table": RT_TABLE_MAIN,
            "proto": RTPROT_KERNEL,
            "scope": RT_SCOPE_LINK,
            "type": RTN_UNICAST,
        }
        held = [("RTA_DST", dst), ("RTA_OIF", index), ("RTA_PREFSRC", source)]
        with mapping_errors(f"add route {subnet}"):
            self._change(RTM_NEWROUTE, rtmsg(), held, facts, NLM_F_CREATE | NLM_F_REPLACE)

    def _address(self, kind: int, index: int, address: Address, flags: int) -> None:
        facts = {"family": socket.AF_INET, "prefixlen": address.prefix_len, "index": index}
        held = [("IFA_LOCAL", address.address), ("IFA_ADDRESS", address.address)]
        self._change(kind, ifaddrmsg(), held, facts, flags)

    def _change(
        self,
        kind: int,
        message: Any,
        held: list[tuple[str, Any]],
        facts: Mapping[str, int] | None = None,
        flags: int = 0,
    ) -> None:
        """One change, confirmed by the kernel.

        Raises:
            OSError: the kernel refused it.
        """
        for name, value in (facts or {}).items():
            message[name] = value
        message["attrs"] = held
        message.encode()
        self._send(kind, NLM_F_REQUEST | NLM_F_ACK | flags, bytes(message.data)[HEADER.size :])
        while not (answers := [body for of, _, body in self._receive() if of == NLMSG_ERROR]):
            pass
        if (code := error_of(answers[0])) != 0:
            raise OSError(code, os.strerror(code))


def _info(kind: str, name: str, data: str, values: Mapping[str, int]) -> tuple[str, Any]:
    """The attributes that an interface, or a bridge port, has by its kind."""
    held = [(f"IFLA_{each.upper()}", value) for each, value in values.items()]
    nested = [(f"IFLA_INFO_{kind}", name), (f"IFLA_INFO_{data}", {"attrs": held})]
    return "IFLA_LINKINFO", {"attrs": nested}


class Netlink:
    """The thread in which all rtnetlink work of this worker runs, one function at a time."""

    def __init__(
        self, enter: Callable[[], None] = no_namespace, open_kernel: Callable[[], Kernel] = Kernel
    ) -> None:
        self._thread = KernelThread("netlink", enter)
        self._open = open_kernel
        self._kernel: Kernel | None = None

    async def run(self, do: Callable[[Kernel], T]) -> T:
        """Run `do` in the thread, undisturbed by other netlink work of this worker."""
        return await self._thread.run(lambda: do(self._opened()))

    @property
    def unwanted(self) -> Collection[str]:
        """The names of the links that hostd removed last."""
        return () if self._kernel is None else self._kernel.unwanted

    def close(self) -> None:
        self._thread.stop(self._close)

    def _close(self) -> None:
        if self._kernel is not None:
            self._kernel.close()

    def _opened(self) -> Kernel:
        if self._kernel is None:
            self._kernel = self._open()
        return self._kernel


@contextmanager
def mapping_errors(what: str, absent: frozenset[int] = frozenset()) -> Generator[None]:
    """Turn the kernel's refusal into the failure of its class; errors in `absent` are success."""
    try:
        yield
    except OSError as error:
        if error.errno not in absent:
            raise of_os_error(error, what) from error
