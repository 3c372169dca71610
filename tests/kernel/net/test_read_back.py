"""What the kernel does not hold, though it said yes, is a fault and leaves nothing behind."""

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any, ClassVar

import pytest

from handlers.errors import HostFault
from handlers.host.net.bridges import Bridges
from handlers.host.net.nft.nftables import Tables
from handlers.host.net.rtnetlink import Kernel, Netlink
from handlers.host.net.rtnetlink_reader import Address
from handlers.host.net.taps import Taps
from handlers.specs import BridgeSpec
from tests.kernel.net.netns import HostNet
from tests.kernel.net.plans import GuestPlan, net_of, set_up

ACME = net_of(3)
GUEST = GuestPlan("acme", ACME, 5)
Opened = Callable[[type[Kernel]], Netlink]


class OldKernel(Kernel):
    """Ignores port attributes that it does not know, as kernels before 4.18 did with `isolated`."""

    def set_port(self, index: int, **attributes: int) -> None:
        attributes.pop("isolated", None)
        super().set_port(index, **attributes)


class WithoutFdb(Kernel):
    def add_static_fdb(self, index: int, mac: str) -> None:
        """Says yes."""


class WithoutNeighbour(Kernel):
    def add_neighbour(self, index: int, address: str, mac: str) -> None:
        """Says yes."""


class WithoutMaster(Kernel):
    def set_link(self, index: int, **attributes: Any) -> None:
        attributes.pop("master", None)
        super().set_link(index, **attributes) if attributes else None


class WithoutAddress(Kernel):
    def add_address(self, index: int, address: Address) -> None:
        """Says yes."""


class WithoutAlias(Kernel):
    def set_link(self, index: int, **attributes: Any) -> None:
        attributes.pop("ifalias", None)
        super().set_link(index, **attributes)


@pytest.fixture
async def net() -> AsyncIterator[HostNet]:
    with HostNet() as made:
        yield made


@pytest.fixture
def opened(net: HostNet) -> Iterator[Opened]:
    with ExitStack() as made:

        def open_with(kernel: type[Kernel]) -> Netlink:
            netlink = Netlink(net.host.enter, kernel)
            made.callback(netlink.close)
            return netlink

        yield open_with


@pytest.mark.parametrize(
    ("kernel", "fact"),
    [
        (OldKernel, "flags"),
        (WithoutFdb, "FDB entry"),
        (WithoutNeighbour, "neighbour"),
    ],
)
async def test_a_tap_that_is_not_as_asked_is_a_fault(
    net: HostNet, opened: Opened, kernel: type[Kernel], fact: str
) -> None:
    await set_up(net, "acme", ACME)

    with pytest.raises(HostFault, match=fact):
        await Taps(opened(kernel), isolate_guests=True).ensure(GUEST.spec)

    assert await net.link(GUEST.tap) is None
    assert net.host.ip("neigh show dev br-tenant-3") == ""


async def test_a_tap_that_is_no_port_of_the_bridge_is_a_fault(net: HostNet, opened: Opened) -> None:
    await set_up(net, "acme", ACME)

    with pytest.raises(HostFault):
        await Taps(opened(WithoutMaster), isolate_guests=False).ensure(GUEST.spec)

    assert await net.link(GUEST.tap) is None


@pytest.mark.parametrize(("kernel", "fact"), [(WithoutAddress, "address"), (WithoutAlias, "alias")])
async def test_a_bridge_that_is_not_as_asked_is_a_fault(
    net: HostNet, opened: Opened, kernel: type[Kernel], fact: str
) -> None:
    with pytest.raises(HostFault, match=fact):
        await Bridges(opened(kernel)).ensure(BridgeSpec("acme", ACME))

    assert await net.link(ACME.bridge_name) is None


class ListsTwice:
    """nft's engine whose ruleset changes while it lists: it prints what it had, then all again."""

    one_socket: ClassVar[bool] = False

    def __init__(self) -> None:
        self.socket: socket.socket | None = None

    def run(self, text: str, flags: int) -> str:
        return "".join(f'{{"nftables": [{{"set": {{"name": "{n}"}}}}]}}\n' for n in ("old", "new"))

    def close(self) -> None:
        """Nothing is open."""


def test_of_a_listing_that_was_begun_again_the_last_counts() -> None:
    tables = Tables(ListsTwice())

    assert tables.read("table inet hostd") == [{"set": {"name": "new"}}]

    tables.close()
