"""Out-of-band changes to hostd's interfaces and rules, as they happen: a stream of hints.

It repairs nothing. A hint says what to check, not what is wrong: some of the changes are hostd's.
The reader calls `ensure`, which changes nothing where all is in effect. Of a message about an
interface only the name is read: most are caused by hostd, ten for each TAP, and the interface is
checked once it is quiet. Not reported, and left to the periodic pass: FDB and neighbour entries,
port flags, sysctls.
"""

import asyncio
import errno
import socket
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial

from handlers.host.linux.kernel_thread import KernelThread, no_namespace
from handlers.host.net.bridges import GATEWAY_OFFSET
from handlers.host.net.netlink_messages import attributes, first_attribute, messages
from handlers.host.net.nftables import NETLINK_NETFILTER, Nft
from handlers.host.net.rtnetlink import Kernel, Netlink
from handlers.host.net.rtnetlink_reader import (
    ADDRESS,
    IFLA_IFNAME,
    LINK,
    ROUTE,
    RTA_OIF,
    SOL_NETLINK,
    Link,
    number,
    text,
)
from schemas import naming
from schemas.naming import BRIDGE_NAME_PATTERN, TAP_NAME_PATTERN

# linux/rtnetlink.h, linux/if_link.h, linux/netfilter/nfnetlink.h
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR = 16, 17, 20, 21
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
IFA_LABEL = 3
NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES = 1, 7
SO_RCVBUFFORCE, BUFFER_BYTES = 33, 1 << 20  # a burst of launches is many hundred messages
DATAGRAM_BYTES = 1 << 17
GATHER_S = 0.02
QUIET_S = 0.1
"""How long changes are gathered: a setup is some ten messages, a teardown by hand a burst."""


@dataclass(frozen=True, slots=True)
class Change:
    """A hint. `kind`: `link` (of the tenant with this net id), `rules`, `uplinks`, or `all` when
    the kernel dropped messages and everything must be looked at."""

    kind: str
    tenant_net_id: int | None = None


class HostWatch:
    """Listens to rtnetlink and nftables in the namespace. Needs: CAP_NET_ADMIN for nftables.

    Source: rtnetlink(7), nf_tables' NFT_MSG_NEWGEN notification.
    """

    def __init__(
        self, netlink: Netlink, nft: Nft, enter: Callable[[], None] = no_namespace
    ) -> None:
        self._netlink = netlink
        self._nft = nft
        self._enter = enter

    async def changes(self) -> AsyncGenerator[Change]:
        """Changes for as long as it is read, each at most once per `QUIET_S`.

        The first is `all`: what happened before it listened is not known.
        """
        links, rules = await self._listen()
        known = await self._nft.outside_changes()
        readers: set[asyncio.Task[set[Change | str]]] = set()
        queue: asyncio.Queue[set[Change | str]] = asyncio.Queue()
        try:
            readers = {
                asyncio.create_task(self._read_links(links, queue)),
                asyncio.create_task(self._read_rules(rules, known, queue)),
            }
            yield Change("all")
            while True:
                gathered = await next_of(queue, readers)
                await asyncio.sleep(QUIET_S)
                while not queue.empty():
                    gathered |= queue.get_nowait()
                names = {hint for hint in gathered if isinstance(hint, str)}
                changes = {hint for hint in gathered if isinstance(hint, Change)}
                if names:
                    changes |= await self._netlink.run(partial(of_names, names))
                for change in sorted(changes, key=repr):
                    yield change
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            links.close()
            rules.close()

    async def _listen(self) -> tuple[socket.socket, socket.socket]:
        """The two sockets, of the namespace that `enter` leads to."""

        def opened() -> tuple[socket.socket, socket.socket]:
            links = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            links.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE))
            rules = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
            rules.bind((0, 0))  # without a port ID it receives nothing
            rules.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)
            links.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
            for opened_one in (links, rules):
                opened_one.setblocking(False)
            return links, rules

        thread = KernelThread("drift", self._enter)
        try:
            return await thread.run(opened)
        finally:
            thread.stop(lambda: None)

    async def _read_links(
        self, links: socket.socket, queue: asyncio.Queue[set[Change | str]]
    ) -> set[Change | str]:
        while True:
            received = await receive(links)
            if received is None:
                queue.put_nowait({Change("all")})
                continue
            found: set[Change | str] = set()
            routes: set[int] = set()
            for kind, body in received:
                if kind in {RTM_NEWLINK, RTM_DELLINK}:
                    found |= name_in(body)
                elif kind in {RTM_NEWADDR, RTM_DELADDR}:
                    label = attributes(body[ADDRESS.size :]).get(IFA_LABEL, b"")
                    found |= named(text(label))
                elif kind in {RTM_NEWROUTE, RTM_DELROUTE} and body[1] == 0:
                    found.add(Change("uplinks"))
                elif kind == RTM_DELROUTE:
                    out = attributes(body[ROUTE.size :]).get(RTA_OIF)
                    routes |= {number(out)} if out else set()
            if routes:
                found |= await self._netlink.run(partial(of_indexes, routes))
            if found:
                queue.put_nowait(found)

    async def _read_rules(
        self, rules: socket.socket, known: int, queue: asyncio.Queue[set[Change | str]]
    ) -> set[Change | str]:
        while True:
            await receive(rules)
            now = await self._nft.outside_changes()
            if now != known:
                known = now
                queue.put_nowait({Change("rules")})


async def next_of(
    queue: asyncio.Queue[set[Change | str]], readers: set[asyncio.Task[set[Change | str]]]
) -> set[Change | str]:
    """The next changes; a reader that failed ends the watch."""
    getter = asyncio.create_task(queue.get())
    try:
        await asyncio.wait({getter, *readers}, return_when=asyncio.FIRST_COMPLETED)
        for reader in readers:
            if reader.done():
                reader.result()
        return await getter
    finally:
        getter.cancel()


async def receive(listener: socket.socket) -> list[tuple[int, bytes]] | None:
    """The messages that are there, at least one; None if the kernel had to drop some.

    A change is several messages within some milliseconds: they are let come, and read in one go,
    so that their making is not held up.
    """
    loop = asyncio.get_running_loop()
    found: list[tuple[int, bytes]] = []
    try:
        data = await loop.sock_recv(listener, DATAGRAM_BYTES)
        await asyncio.sleep(GATHER_S)
        while data:
            found += [(kind, body) for kind, _flags, _sequence, body in messages(data)]
            data = listener.recv(DATAGRAM_BYTES)
    except BlockingIOError:
        return found
    except OSError as error:
        if error.errno == errno.ENOBUFS:
            return None
        raise
    return found


def of_indexes(indexes: set[int], kernel: Kernel) -> set[Change]:
    """Changes of the links with these indexes that are still there."""
    names = (kernel.link_name(index) for index in indexes)
    return {change for name in names if name is not None for change in named(name)}


def name_in(body: bytes) -> set[Change | str]:
    """The name of the link that a message is about, if it may be a bridge or TAP of ours."""
    name = text(first_attribute(body[LINK.size :], IFLA_IFNAME))
    return {name} if named(name) else set()


def of_names(names: set[str], kernel: Kernel) -> set[Change]:
    """Changes of the links that are gone or not as they should be."""
    return {change for name in names if not is_intact(kernel.link(name)) for change in named(name)}


def is_intact(link: Link | None) -> bool:
    """Whether a bridge or TAP is as hostd leaves it, as far as the interface itself shows."""
    if link is None or not link.up:
        return False
    if (match := BRIDGE_NAME_PATTERN.fullmatch(link.name)) is not None:
        mac = naming.mac_address(int(match[1]), GATEWAY_OFFSET)
        return link.mac == mac and link.alias.startswith(naming.ALIAS_PREFIX)
    return link.master is not None


def named(name: str) -> set[Change]:
    """A change of the tenant that a bridge's or TAP's name belongs to; of none for other links."""
    match = BRIDGE_NAME_PATTERN.fullmatch(name) or TAP_NAME_PATTERN.fullmatch(name)
    return set() if match is None else {Change("link", int(match[1]))}
