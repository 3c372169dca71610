"""The host's IPv4 routes, kept: a new tenant's subnet is checked without listing thousands of them.

The kernel queues a message for each route that is added before the program that adds it goes on, so
none is missed that was there before the question. Some deletions it does not report (of a link that
goes down): so a route that is found here is looked for in a full listing before it counts.
"""

import errno
import socket
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Network

from handlers.errors import of_os_error
from handlers.host.net.netlink_messages import pieces
from handlers.host.net.rtnetlink_reader import RTM_NEWROUTE, Route, route_of

RTMGRP_IPV4_ROUTE = 0x40
RTM_DELROUTE = 25
SO_RCVBUFFORCE, BUFFER_BYTES, DATAGRAM_BYTES = 33, 1 << 20, 1 << 16

Network = tuple[int, int]
"""First address and length of the prefix."""


class RouteIndex:
    """Routes by network and by link: none of these walks all of them."""

    def __init__(self) -> None:
        self._routes: dict[Network, set[Route]] = {}
        self._networks: list[Network] = []
        self._by_link: dict[int, set[Route]] = {}

    def clear(self) -> None:
        self._routes.clear()
        self._networks.clear()
        self._by_link.clear()

    def add(self, route: Route) -> None:
        network = network_of(route)
        if network not in self._routes:
            insort(self._networks, network)
        self._routes.setdefault(network, set()).add(route)
        for link in route.links:
            self._by_link.setdefault(link, set()).add(route)

    def discard(self, route: Route) -> None:
        """Absent is success."""
        network = network_of(route)
        held = self._routes.get(network, set())
        if route not in held:
            return
        held.discard(route)
        if not held:
            del self._routes[network], self._networks[bisect_left(self._networks, network)]
        for link in set(route.links):
            self._by_link[link].discard(route)
            if not self._by_link[link]:
                del self._by_link[link]

    def of_link_alone(self, link: int) -> list[Route]:
        """Those that go out by this link and no other."""
        return [route for route in self._by_link.get(link, ()) if route.links == (link,)]

    def overlapping(self, subnet: IPv4Network) -> Iterator[Route]:
        """Those that have an address in common with the subnet; not the default routes."""
        first, last, length = int(subnet[0]), int(subnet[-1]), subnet.prefixlen
        for shorter in range(1, length):
            mask = ~((1 << (32 - shorter)) - 1)
            yield from self._routes.get((first & mask, shorter), ())
        inside = slice(
            bisect_left(self._networks, (first, length)), bisect_right(self._networks, (last, 32))
        )
        for network in self._networks[inside]:
            yield from self._routes[network]


class KeptRoutes:
    """The index, kept up to date. Lives in one thread, in the namespace that it is in."""

    def __init__(self, list_routes: Callable[[], Iterable[Route]]) -> None:
        self._list = list_routes
        self._view = memoryview(bytearray(DATAGRAM_BYTES))
        self._index = RouteIndex()
        self._listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._listener.setblocking(False)
        self._listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        self._listener.bind((0, RTMGRP_IPV4_ROUTE))
        self._read()

    def close(self) -> None:
        self._listener.close()

    def overlapping(self, subnet: IPv4Network, counts: Callable[[Route], bool]) -> list[Route]:
        """The routes that have an address in common with the subnet and count; not the default."""
        self._take_in()
        if not any(map(counts, self._index.overlapping(subnet))):
            return []
        self._read()
        return list(filter(counts, self._index.overlapping(subnet)))

    def forget(self, link: int) -> None:
        """The link is being deleted, and with it the routes that go out by it alone."""
        self._take_in()
        for route in self._index.of_link_alone(link):
            self._index.discard(route)

    def _read(self) -> None:
        self._index.clear()
        for route in self._list():
            self._index.add(route)

    def _take_in(self) -> None:
        """Read what was reported by now."""
        while True:
            try:
                size = self._listener.recv_into(self._view)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise of_os_error(error, "cannot read route notifications") from error
                self._read()
                continue
            for kind, _port, body in pieces(bytes(self._view[:size])):
                if kind == RTM_NEWROUTE:
                    self._index.add(route_of(body))
                elif kind == RTM_DELROUTE:
                    self._index.discard(route_of(body))


def network_of(route: Route) -> Network:
    address, _, length = route.dst.partition("/")
    return int.from_bytes(socket.inet_aton(address), "big"), int(length)
