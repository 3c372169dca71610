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
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Network
from typing import Any, TypeVar

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from handlers.errors import of_os_error
from handlers.host.linux.kernel_thread import CALL_S, kernel_thread, no_namespace
from handlers.host.net.conntrack import flush_conntrack, open_socket
from handlers.host.net.kept_routes import KeptRoutes
from handlers.host.net.netlink_messages import HEADER
from handlers.host.net.rtnetlink_messages import (
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTM_DELADDR,
    RTM_NEWLINK,
    Request,
    link_change,
    new_address,
    new_bridge,
    new_fdb_entry,
    new_neighbour,
    no_link,
    no_neighbour,
    port_change,
)
from handlers.host.net.rtnetlink_reader import RT_TABLE_MAIN, RTM_NEWROUTE, Address, Reader

T = TypeVar("T")

FLUSHED_MAX = 4096  # some more than a host has instances

# linux/rtnetlink.h
RTPROT_KERNEL, RT_SCOPE_LINK, RTN_UNICAST = 2, 253, 1


class Kernel(Reader):
    """rtnetlink of one namespace. Synchronous; lives in one thread.

    The messages of each launch and each new tenant are spelled in `rtnetlink_messages`, the rare
    ones by pyroute2; all are sent and confirmed on the socket itself, since pyroute2's own round
    trip takes 0.3 ms and more for what the kernel does in 0.03.

    `unwanted` are the names of the links that hostd removed last: nobody has to be told that these
    are gone. `flushed` are the addresses whose flows hostd ended and that had no TAP since: nothing
    has to be looked for at the next launch there (ADR 0974).

    Source: rtnetlink(7), ip-link(8), bridge(8). Needs: CAP_NET_ADMIN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unwanted: set[str] = set()
        self.flushed: set[str] = set()
        self._queued: list[Request] | None = None
        self._kept_routes: KeptRoutes | None = None
        self._ctnetlink: socket.socket | None = None

    @property
    def kept_routes(self) -> KeptRoutes:
        """All routes, kept from the first use on."""
        if self._kept_routes is None:
            self._kept_routes = KeptRoutes(self.routes)
        return self._kept_routes

    def close(self) -> None:
        super().close()
        if self._kept_routes is not None:
            self._kept_routes.close()
        if self._ctnetlink is not None:
            self._ctnetlink.close()

    def flush_conntrack(self, subnet: IPv4Network) -> None:
        """Delete all tracked connections with an address of the subnet; its socket is kept."""
        if self._ctnetlink is None:
            self._ctnetlink = open_socket()
        try:
            flush_conntrack(self._ctnetlink, subnet)
        except BaseException:  # an answer may still come
            self._ctnetlink.close()
            self._ctnetlink = None
            raise
        if subnet.prefixlen == subnet.max_prefixlen:
            if len(self.flushed) >= FLUSHED_MAX:
                self.flushed.clear()  # then the next launches look once more
            self.flushed.add(str(subnet.network_address))

    @contextmanager
    def together(self) -> Generator[None]:
        """Send what is asked for inside in one go at the end, in its order; each is confirmed.

        Raises:
            Failure: that of the first which the kernel refused; the others were made.
        """
        queued = self._queued = []
        try:
            yield
        finally:
            self._queued = None
        self._confirm(queued)

    def add_bridge(self, name: str, mac: str) -> None:
        """A bridge that is down and forwards at once: no STP, no snooping, a MAC that stays."""
        self._change(new_bridge(name, mac))

    def set_link(self, index: int, **attributes: Any) -> None:
        """`state`, `master`, `address`, `ifalias` of a link, in one message."""
        self._change(link_change(index, **attributes))

    def set_bridge(self, index: int, **attributes: int) -> None:
        held = [_info("KIND", "bridge", "DATA", attributes)]
        what = f"set {', '.join(attributes)} of bridge {index}"
        self._spell(what, RTM_NEWLINK, ifinfmsg(), held, {"index": index})

    def set_port(self, index: int, **attributes: int) -> None:
        """Attributes of a bridge port, e.g. `isolated`; old kernels ignore unknown ones."""
        self._change(port_change(index, **attributes))

    def delete_link(self, index: int) -> None:
        """Gone already is success. Blocks for 15 to 40 ms: the kernel waits for its readers."""
        self._change(no_link(index, frozenset({errno.ENODEV})))

    def add_address(self, index: int, address: Address) -> None:
        self._change(new_address(index, address))

    def delete_address(self, index: int, address: Address) -> None:
        gone = frozenset({errno.EADDRNOTAVAIL, errno.ENODEV})
        what = f"delete address {address.address}/{address.prefix_len}"
        facts = {"family": socket.AF_INET, "prefixlen": address.prefix_len, "index": index}
        held = [("IFA_LOCAL", address.address), ("IFA_ADDRESS", address.address)]
        self._spell(what, RTM_DELADDR, ifaddrmsg(), held, facts, absent=gone)

    def add_neighbour(self, index: int, address: str, mac: str) -> None:
        self._change(new_neighbour(index, address, mac))

    def delete_neighbour(self, index: int, address: str) -> None:
        self._change(no_neighbour(index, address, frozenset({errno.ENOENT, errno.ENODEV})))

    def add_static_fdb(self, index: int, mac: str) -> None:
        """`bridge fdb replace MAC dev PORT master static`: NUD_PERMANENT would mean the host."""
        self._change(new_fdb_entry(index, mac))

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
        flags = NLM_F_CREATE | NLM_F_REPLACE
        self._spell(f"add route {subnet}", RTM_NEWROUTE, rtmsg(), held, facts, flags)

    def _spell(
        self,
        what: str,
        kind: int,
        message: Any,
        held: list[tuple[str, Any]],
        facts: Mapping[str, int],
        flags: int = 0,
        absent: frozenset[int] = frozenset(),
    ) -> None:
        """A change in pyroute2's spelling."""
        for name, value in facts.items():
            message[name] = value
        message["attrs"] = held
        message.encode()
        self._change(Request(kind, flags, bytes(message.data)[HEADER.size :], what, absent))

    def _change(self, request: Request) -> None:
        """Make one change, confirmed by the kernel, or with those around it (`together`).

        Raises:
            Failure: the kernel refused it.
        """
        if self._queued is None:
            self._confirm([request])
        else:
            self._queued.append(request)

    def _confirm(self, requests: Sequence[Request]) -> None:
        codes = self._acknowledged(
            [request.with_header(self._next_sequence()) for request in requests]
        )
        for request, code in zip(requests, codes, strict=True):
            if code and code not in request.absent:
                raise of_os_error(OSError(code, os.strerror(code)), request.what)


def _info(kind: str, name: str, data: str, values: Mapping[str, int]) -> tuple[str, Any]:
    """The attributes that an interface, or a bridge port, has by its kind."""
    held = [(f"IFLA_{each.upper()}", value) for each, value in values.items()]
    nested = [(f"IFLA_INFO_{kind}", name), (f"IFLA_INFO_{data}", {"attrs": held})]
    return "IFLA_LINKINFO", {"attrs": nested}


class Netlink:
    """The thread in which all rtnetlink work of this worker runs, one function at a time."""

    def __init__(
        self,
        enter: Callable[[], None] = no_namespace,
        open_kernel: Callable[[], Kernel] = Kernel,
        *,
        limit_s: float = CALL_S,
    ) -> None:
        self._open = open_kernel
        self._kernel: Kernel | None = None
        self._thread = kernel_thread(
            "netlink", enter, self._opened, lambda kernel: kernel.close(), limit_s=limit_s
        )

    async def run(self, do: Callable[[Kernel], T]) -> T:
        """Run `do` in the thread, undisturbed by other netlink work of this worker.

        Raises:
            Abandoned: it did not return in its time; see `call_threads`.
        """
        return await self._thread.run(do)

    @property
    def unwanted(self) -> Collection[str]:
        """The names of the links that hostd removed last."""
        return () if self._kernel is None else self._kernel.unwanted

    @property
    def flushed(self) -> Collection[str]:
        """The addresses whose flows hostd ended and that had no TAP since."""
        return () if self._kernel is None else self._kernel.flushed

    def close(self) -> None:
        self._thread.stop()

    def _opened(self) -> Kernel:
        self._kernel = self._open()
        return self._kernel
