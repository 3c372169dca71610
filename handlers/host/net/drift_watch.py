"""Out-of-band changes to hostd's interfaces and rules, as they happen: a stream of hints.

It repairs nothing. A hint says what to check, not what is wrong. What hostd does itself is left out
as early as possible: the kernel's filter drops what is about other interfaces, and what hostd's own
sockets caused (the notifications of links do not name their cause). Of the messages about one link,
ten for each TAP, the last is read once the link is quiet: if that shows the link as hostd leaves
it, or gone and hostd has no use for it, there is nothing to report. Of other programs' commits to
nf_tables only the names of the tables are read. Not reported, and left to the periodic pass: FDB
and neighbour entries, port flags, sysctls.
"""

import asyncio
import errno
import socket
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

from handlers.host.linux.kernel_thread import kernel_thread, no_namespace, nothing
from handlers.host.net.bridges import GATEWAY_OFFSET
from handlers.host.net.netlink_messages import attributes, first_attribute, pieces
from handlers.host.net.nft.commits import names_hostd, rules_listener
from handlers.host.net.nft.nftables import Nft
from handlers.host.net.rtnetlink import Kernel, Netlink
from handlers.host.net.rtnetlink_reader import (
    ADDRESS,
    IFLA_IFNAME,
    LINK,
    ROUTE,
    RTA_OIF,
    Link,
    link_of,
    number,
    text,
)
from handlers.host.net.socket_filter import attach, drop_port, links_named
from schemas import naming
from schemas.naming import BRIDGE_NAME_PATTERN, TAP_NAME_PATTERN

# linux/rtnetlink.h, linux/if_link.h
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR = 16, 17, 20, 21
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
IFA_LABEL = 3
SO_RCVBUFFORCE, BUFFER_BYTES = 33, 1 << 20  # a burst of launches is many hundred messages
DATAGRAM_BYTES = 1 << 17
QUIET_S = 0.1
"""How long changes are gathered: a setup is some ten messages, a teardown by hand a burst."""
RULES_EVERY_S = 0.5
"""A check of the rules after a change looks at all tenants: not more often than this."""


@dataclass(frozen=True, slots=True)
class Change:
    """A hint. `kind`: `link` (of the tenant with this net id), `rules`, `uplinks`, or `all` when
    the kernel dropped messages and everything must be looked at."""

    kind: str
    tenant_net_id: int | None = None


ALL, RULES, UPLINKS = Change("all"), Change("rules"), Change("uplinks")


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
        loop = asyncio.get_running_loop()
        links, rules = await self._listen()
        try:
            known = await self._nft.outside_changes()
            rules_at = 0.0
            yield ALL
            while True:
                await readable((links, rules), (links,), rules_at)
                await asyncio.sleep(QUIET_S)
                found = await self._of_links(links)
                if loop.time() >= rules_at and rules_touched(rules):
                    now = await self._nft.outside_changes()
                    found |= {RULES} if now != known else set()
                    known = now
                    rules_at = loop.time() + RULES_EVERY_S
                for change in sorted(found, key=repr):
                    yield change
        finally:
            links.close()
            rules.close()

    async def _listen(self) -> tuple[socket.socket, socket.socket]:
        """The two sockets, of the namespace that `enter` leads to."""
        own = await self._netlink.run(lambda kernel: kernel.port)
        own_rules = await self._nft.run(lambda tables: tables.port)
        thread = kernel_thread("drift", self._enter, nothing, lambda _: None)
        try:
            return await thread.run(lambda _: (links_listener(own), own_rules_left_out(own_rules)))
        finally:
            thread.stop()

    async def _of_links(self, links: socket.socket) -> set[Change]:
        """What the messages that have come call for."""
        heard: dict[int, tuple[int, bytes]] = {}  # the last message about each link
        routes: set[int] = set()
        found: set[Change] = set()
        for kind, body in received(links):
            if kind in {RTM_NEWLINK, RTM_DELLINK}:
                heard[LINK.unpack_from(body)[2]] = kind, body
            elif kind in {RTM_NEWADDR, RTM_DELADDR}:
                label = text(attributes(body[ADDRESS.size :]).get(IFA_LABEL, b""))
                found |= self._wanted(label)
            elif kind in {RTM_NEWROUTE, RTM_DELROUTE} and body[1] == 0:
                found.add(UPLINKS)
            elif kind == RTM_DELROUTE:
                out = attributes(body[ROUTE.size :]).get(RTA_OIF)
                routes |= {number(out)} if out else set()
            elif kind == LOST:
                found.add(ALL)
        if routes:
            for name in await self._netlink.run(partial(names_of, routes)):
                found |= self._wanted(name)
        last = {
            text(first_attribute(body[LINK.size :], IFLA_IFNAME)): (kind, body)
            for kind, body in heard.values()  # of two of one name, the later one
        }
        for name, (kind, body) in last.items():
            left = None if kind == RTM_DELLINK else link_of(body, nested=False)
            if named(name) and not is_intact(left):
                found |= self._wanted(name)
        return found

    def _wanted(self, name: str) -> set[Change]:
        """A change of a link, unless hostd itself has removed it."""
        return set() if name in self._netlink.unwanted else named(name)


LOST = 0
"""In place of the type of a message: the kernel dropped some."""


def links_listener(own: int) -> socket.socket:
    """Hears of links that have names as hostd's, and of addresses and routes that the socket with
    the port ID `own` did not change."""
    links = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    links.setblocking(False)
    links.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    attach(links, links_named(b"tn", b"br-t", (RTM_NEWLINK, RTM_DELLINK), drop_port(own)))
    links.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE))
    return links


def own_rules_left_out(own: int | None) -> socket.socket:
    """Hears of changes of nf_tables by others; of all where hostd's have no port ID."""
    rules = rules_listener()
    if own is not None:
        attach(rules, drop_port(own))
    return rules


async def readable(
    listeners: Collection[socket.socket], before: Collection[socket.socket], at: float
) -> None:
    """Return when one of the listeners has a message; until the loop's time `at`, one of `before`.

    Only noticed here: messages of one change are let come, and are read in one go.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    def listen(to: Collection[socket.socket]) -> None:
        for listener in to:
            loop.add_reader(listener, wake)

    waits = loop.time() < at
    later = loop.call_at(at, listen, listeners) if waits else None
    listen(before if waits else listeners)
    try:
        await ready
    finally:
        if later is not None:
            later.cancel()
        for listener in listeners:
            loop.remove_reader(listener)


def received(listener: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Type and body of the messages that are there; `LOST` if the kernel had to drop some."""
    buffer = memoryview(bytearray(DATAGRAM_BYTES))
    while True:
        try:
            size = listener.recv_into(buffer)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield LOST, b""
            continue
        for kind, _port, body in pieces(bytes(buffer[:size])):
            yield kind, body


def rules_touched(rules: socket.socket) -> bool:
    """Whether the messages that are there may be about hostd's tables; reads all of them."""
    messages = list(received(rules))
    return any(kind == LOST or names_hostd(body) for kind, body in messages)


def names_of(indexes: set[int], kernel: Kernel) -> set[str]:
    """The names of the links with these indexes that are still there."""
    names = (kernel.link_name(index) for index in indexes)
    return {name for name in names if name is not None}


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
