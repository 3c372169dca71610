"""Changes of links, addresses, neighbours, FDB and routes by rtnetlink, and the thread for them.

A thin typed layer on pyroute2; it knows the kernel's messages and nothing of tenants. Reads are in
`netlink_read.py`. Never reads /sys/class/net: it shows the namespace that sysfs was mounted in,
not the one the thread is in.
"""

import errno
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

from pyroute2 import IPRoute, NetlinkError  # pyright: ignore[reportMissingTypeStubs]

from handlers.host.errnos import os_failure
from handlers.host.kernel_thread import KernelThread, stay
from handlers.host.netlink_read import NUD_NOARP, NUD_PERMANENT, Address, Reader

T = TypeVar("T")

NTF_MASTER = 0x04
RTPROT_KERNEL = 2
RT_SCOPE_LINK = 253


class Kernel(Reader):
    """rtnetlink of one namespace. Synchronous; lives in one thread.

    Source: rtnetlink(7), ip-link(8), bridge(8). Needs: CAP_NET_ADMIN.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ipr: Any = IPRoute()

    def close(self) -> None:
        super().close()
        self._ipr.close()

    def add_bridge(self, name: str, mac: str) -> None:
        """A bridge that is down and forwards at once: no STP, no snooping, a MAC that stays."""
        with doing(f"add bridge {name}"):
            self._ipr.link(
                "add",
                ifname=name,
                kind="bridge",
                address=mac,
                br_stp_state=0,
                br_forward_delay=0,
                br_mcast_snooping=0,
            )

    def set_link(self, index: int, **attributes: Any) -> None:
        """`state`, `master`, `address`, `ifalias` of a link, in one message."""
        with doing(f"set {', '.join(attributes)} of link {index}"):
            self._ipr.link("set", index=index, **attributes)

    def set_bridge(self, index: int, **attributes: int) -> None:
        with doing(f"set {', '.join(attributes)} of bridge {index}"):
            self._ipr.link("set", index=index, kind="bridge", **attributes)

    def set_port(self, index: int, **attributes: int) -> None:
        """Attributes of a bridge port, e.g. `isolated`; old kernels ignore unknown ones."""
        with doing(f"set {', '.join(attributes)} of bridge port {index}"):
            self._ipr.brport("set", index=index, **attributes)

    def delete_link(self, index: int) -> None:
        """Gone already is success. Blocks for 15 to 40 ms: the kernel waits for its readers."""
        with doing(f"delete link {index}", absent=frozenset({errno.ENODEV})):
            self._ipr.link("del", index=index)

    def add_address(self, index: int, address: Address) -> None:
        with doing(f"add address {address.address}/{address.prefix_len}"):
            self._ipr.addr(
                "replace", index=index, address=address.address, prefixlen=address.prefix_len
            )

    def delete_address(self, index: int, address: Address) -> None:
        gone = frozenset({errno.EADDRNOTAVAIL, errno.ENODEV})
        with doing(f"delete address {address.address}/{address.prefix_len}", absent=gone):
            self._ipr.addr(
                "del", index=index, address=address.address, prefixlen=address.prefix_len
            )

    def add_neighbour(self, index: int, address: str, mac: str) -> None:
        with doing(f"add neighbour {address}"):
            self._ipr.neigh("replace", ifindex=index, dst=address, lladdr=mac, state=NUD_PERMANENT)

    def delete_neighbour(self, index: int, address: str) -> None:
        gone = frozenset({errno.ENOENT, errno.ENODEV})
        with doing(f"delete neighbour {address}", absent=gone):
            self._ipr.neigh("del", ifindex=index, dst=address)

    def add_static_fdb(self, index: int, mac: str) -> None:
        """`bridge fdb replace MAC dev PORT master static`: NUD_PERMANENT would mean the host."""
        with doing(f"add FDB entry {mac}"):
            self._ipr.fdb("replace", ifindex=index, lladdr=mac, state=NUD_NOARP, flags=NTF_MASTER)

    def add_connected_route(self, index: int, subnet: str, source: str) -> None:
        """What the kernel adds with an address, for when somebody took it away."""
        with doing(f"add route {subnet}"):
            self._ipr.route(
                "replace",
                dst=subnet,
                oif=index,
                prefsrc=source,
                scope=RT_SCOPE_LINK,
                proto=RTPROT_KERNEL,
            )


class Netlink:
    """The thread in which all rtnetlink work of this worker runs, one function at a time."""

    def __init__(
        self, enter: Callable[[], None] = stay, open_kernel: Callable[[], Kernel] = Kernel
    ) -> None:
        self._thread = KernelThread("netlink", enter)
        self._open = open_kernel
        self._kernel: Kernel | None = None

    async def run(self, do: Callable[[Kernel], T]) -> T:
        """Run `do` in the thread, undisturbed by other netlink work of this worker."""
        return await self._thread.run(lambda: do(self._opened()))

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
def doing(what: str, absent: frozenset[int] = frozenset()) -> Generator[None]:
    """Turn the kernel's refusal into the failure of its class; errors in `absent` are success."""
    try:
        yield
    except NetlinkError as error:
        refused: Any = error
        if refused.code not in absent:
            raise os_failure(OSError(int(refused.code), ""), what) from error
    except OSError as error:
        raise os_failure(error, what) from error
