"""Links, addresses, neighbours, FDB and routes by rtnetlink: a thin typed layer on pyroute2.

Knows the kernel's messages and nothing of tenants. Everything is read by name or by index with the
kernel's own filters; whole dumps are left to the few questions that need them. Never reads
/sys/class/net: it shows the namespace that sysfs was mounted in, not the one the thread is in.
"""

import errno
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pyroute2 import IPRoute, NetlinkError  # pyright: ignore[reportMissingTypeStubs]

from handlers.host.errnos import os_failure
from handlers.host.kernel_thread import KernelThread, stay

T = TypeVar("T")

IFF_UP = 0x1
NTF_MASTER = 0x04
NUD_NOARP = 0x40
NUD_PERMANENT = 0x80
RT_TABLE_MAIN = 254
RTPROT_KERNEL = 2
RT_SCOPE_LINK = 253


@dataclass(frozen=True, slots=True)
class Link:
    """One link as the kernel reports it. `port` are the bridge port's attributes, if it is one."""

    index: int
    name: str
    kind: str | None
    alias: str
    mac: str
    up: bool
    master: int | None
    info: dict[str, Any]
    port: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Address:
    address: str
    prefix_len: int


@dataclass(frozen=True, slots=True)
class Route:
    """An IPv4 route. `links` are the indexes it goes out by; several if it is multipath."""

    dst: str
    table: int
    links: tuple[int, ...]


class Kernel:
    """rtnetlink of one namespace. Synchronous; lives in one thread.

    Source: rtnetlink(7), include/uapi/linux/{if_link,neighbour,rtnetlink}.h. Needs: CAP_NET_ADMIN.
    """

    def __init__(self) -> None:
        self._ipr: Any = IPRoute()

    def close(self) -> None:
        self._ipr.close()

    # -- links ---------------------------------------------------------------------------------

    def link(self, name: str) -> Link | None:
        with doing(f"read link {name}"):
            try:
                messages = self._ipr.link("get", ifname=name)
            except NetlinkError as error:
                if error.code in {errno.ENODEV, errno.ENOENT}:
                    return None
                raise
            return link_of(messages[0])

    def links(self, *, kind: str | None = None, master: int | None = None) -> list[Link]:
        """Links of one kind or below one master, filtered by the kernel."""
        wanted: dict[str, Any] = {} if kind is None else {"kind": kind}
        if master is not None:
            wanted["master"] = master
        with doing("list links"):
            found = [link_of(message) for message in self._ipr.link("dump", **wanted)]
        return [
            link
            for link in found
            if (kind is None or link.kind == kind) and (master is None or link.master == master)
        ]

    def link_names(self, indexes: set[int]) -> set[str]:
        """Names of links; one that went away in between is left out."""
        names: set[str] = set()
        for index in indexes:
            with doing(f"read link {index}"):
                try:
                    names.add(link_of(self._ipr.link("get", index=index)[0]).name)
                except NetlinkError as error:
                    if error.code != errno.ENODEV:
                        raise
        return names

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
        """Gone already is success."""
        with doing(f"delete link {index}"):
            try:
                self._ipr.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise

    # -- addresses -----------------------------------------------------------------------------

    def addresses(self, index: int) -> list[Address]:
        """IPv4 addresses of a link."""
        with doing(f"list addresses of link {index}"):
            return [
                Address(message.get_attr("IFA_LOCAL"), message["prefixlen"])
                for message in self._ipr.addr("dump", index=index, family=socket.AF_INET)
                if message["index"] == index
            ]

    def add_address(self, index: int, address: Address) -> None:
        with doing(f"add address {address.address}/{address.prefix_len}"):
            self._ipr.addr(
                "replace", index=index, address=address.address, prefixlen=address.prefix_len
            )

    def delete_address(self, index: int, address: Address) -> None:
        with doing(f"delete address {address.address}/{address.prefix_len}"):
            self._ipr.addr(
                "del", index=index, address=address.address, prefixlen=address.prefix_len
            )

    # -- neighbours and FDB --------------------------------------------------------------------

    def permanent_neighbours(self, index: int) -> dict[str, str]:
        """Address to MAC of the IPv4 neighbours that were set by hand on a link."""
        with doing(f"list neighbours of link {index}"):
            return {
                message.get_attr("NDA_DST"): message.get_attr("NDA_LLADDR")
                for message in self._ipr.neigh("dump", ifindex=index, family=socket.AF_INET)
                if message["ifindex"] == index and message["state"] & NUD_PERMANENT
            }

    def neighbour(self, index: int, address: str) -> str | None:
        """The MAC of a permanent neighbour, or None."""
        message = self._one_neighbour(ifindex=index, dst=address, family=socket.AF_INET)
        if message is None or not message["state"] & NUD_PERMANENT:
            return None
        return str(message.get_attr("NDA_LLADDR"))

    def add_neighbour(self, index: int, address: str, mac: str) -> None:
        with doing(f"add neighbour {address}"):
            self._ipr.neigh("replace", ifindex=index, dst=address, lladdr=mac, state=NUD_PERMANENT)

    def delete_neighbour(self, index: int, address: str) -> None:
        with doing(f"delete neighbour {address}"):
            try:
                self._ipr.neigh("del", ifindex=index, dst=address)
            except NetlinkError as error:
                if error.code not in {errno.ENOENT, errno.ENODEV}:
                    raise

    def has_static_fdb(self, index: int, mac: str) -> bool:
        """Whether the bridge sends frames for the MAC to this port, without having learnt it."""
        message = self._one_neighbour(ifindex=index, lladdr=mac, family=socket.AF_BRIDGE)
        return message is not None and message["ifindex"] == index and message["state"] == NUD_NOARP

    def add_static_fdb(self, index: int, mac: str) -> None:
        """`bridge fdb replace MAC dev PORT master static`: NUD_PERMANENT would mean the host."""
        with doing(f"add FDB entry {mac}"):
            self._ipr.fdb("replace", ifindex=index, lladdr=mac, state=NUD_NOARP, flags=NTF_MASTER)

    def _one_neighbour(self, **wanted: Any) -> Any:
        with doing("read neighbour"):
            try:
                messages = list(self._ipr.neigh("get", **wanted))
            except NetlinkError as error:
                if error.code in {errno.ENOENT, errno.ENODEV}:
                    return None
                raise
            return messages[0] if messages else None

    # -- routes --------------------------------------------------------------------------------

    def routes(self, *, link: int | None = None, table: int | None = None) -> list[Route]:
        """IPv4 routes: all, or those of a link or a table. `0.0.0.0/0` is the default route."""
        wanted: dict[str, int] = {} if link is None else {"oif": link}
        if table is not None:
            wanted["table"] = table
        with doing("list routes"):
            messages = list(self._ipr.route("dump", family=socket.AF_INET, **wanted))
        found = [route_of(message) for message in messages]
        return [
            route
            for route in found
            if (link is None or link in route.links) and (table is None or route.table == table)
        ]

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

    def __init__(self, enter: Callable[[], None] = stay) -> None:
        self._thread = KernelThread("netlink", enter)
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
            self._kernel = Kernel()
        return self._kernel


@contextmanager
def doing(what: str) -> Generator[None]:
    """Turn the kernel's refusal into the failure of its class."""
    try:
        yield
    except NetlinkError as error:
        refused: Any = error
        raise os_failure(OSError(int(refused.code), ""), what) from error
    except OSError as error:
        raise os_failure(error, what) from error


def link_of(message: Any) -> Link:
    linkinfo = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=linkinfo and linkinfo.get_attr("IFLA_INFO_KIND"),
        alias=message.get_attr("IFLA_IFALIAS") or "",
        mac=message.get_attr("IFLA_ADDRESS") or "",
        up=bool(message["flags"] & IFF_UP),
        master=message.get_attr("IFLA_MASTER"),
        info=attributes_of(linkinfo and linkinfo.get_attr("IFLA_INFO_DATA")),
        port=attributes_of(linkinfo and linkinfo.get_attr("IFLA_INFO_SLAVE_DATA")),
    )


def attributes_of(nested: Any) -> dict[str, Any]:
    """A nest's attributes by name; one that pyroute2 has no type for is left out."""
    if nested is None or not hasattr(nested, "get"):
        return {}
    return {str(name): value for name, value in (nested.get("attrs") or ()) if name != "UNKNOWN"}


def route_of(message: Any) -> Route:
    links = [message.get_attr("RTA_OIF")]
    links += [hop["oif"] for hop in message.get_attr("RTA_MULTIPATH") or ()]
    return Route(
        dst=f"{message.get_attr('RTA_DST') or '0.0.0.0'}/{message['dst_len']}",
        table=message.get_attr("RTA_TABLE") or message["table"],
        links=tuple(index for index in links if index),
    )
