"""Elements are changed alike by nf_tables' own messages, by libnftables and by the program.

What another program commits is noticed by each, if it is about hostd's tables.
"""

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from handlers.errors import HostFault
from handlers.host.net.nft.elements import Member
from handlers.host.net.nft.libnftables import Absent, Engine, Library, Program
from handlers.host.net.nft.nftables import Nft
from handlers.host.net.ruleset import BaseRules
from schemas.settings import NetworkSettings
from tests.kernel.net.netns import HostNet

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

GUESTS, PINS, TENANTS = "bridge hostd guests", "bridge hostd pins", "inet hostd tenants"
MEMBERS: tuple[Member, ...] = (
    (GUESTS, ("tn3i5",)),
    (PINS, ("tn3i5", "02:fc:00:03:00:05", "10.240.3.5")),
    (TENANTS, ("br-tenant-3",)),
    ("inet hostd gateways", ("br-tenant-3", "10.240.3.1")),
    ("inet hostd dropped", ("br-tenant-3",)),
    ("inet hostd uplinks", ("enp0s31f6.4094",)),
)
STRAY: Member = (PINS, ("tn3i5", "02:fc:00:03:00:05", "10.240.3.6"))


def textual() -> Library:
    """libnftables, whose socket was not found."""
    library = Library()
    assert library.socket is not None
    library.socket.close()
    library.socket = None
    return library


ENGINES: dict[str, Callable[[], Engine]] = {
    "messages": Library,
    "libnftables": textual,
    "program": Program,
}


@pytest.fixture
def net() -> Iterator[HostNet]:
    with HostNet() as made:
        yield made


@pytest.fixture(params=ENGINES)
def nft(net: HostNet, request: pytest.FixtureRequest) -> Iterator[Nft]:
    made = Nft(net.host.enter, ENGINES[request.param])
    yield made
    made.close()


async def with_base(nft: Nft) -> None:
    await BaseRules(nft, NetworkSettings()).ensure()


async def test_the_engine_is_the_one_that_is_tested(
    nft: Nft, request: pytest.FixtureRequest
) -> None:
    await with_base(nft)

    port = await nft.run(lambda tables: tables.port)

    assert (port is not None) == (request.node.callspec.params["nft"] == "messages")


async def test_what_is_added_is_what_the_program_adds(net: HostNet, nft: Nft) -> None:
    await with_base(nft)
    before = net.host.ruleset()

    await nft.run(lambda tables: tables.change(add=MEMBERS))
    by_engine = net.host.ruleset()
    assert await nft.run(lambda tables: tables.has(MEMBERS))
    await nft.run(lambda tables: tables.change(remove=MEMBERS))
    assert net.host.ruleset() == before

    def by_text() -> None:
        for name, parts in MEMBERS:
            head = f'"{parts[0]}"' if "." in parts[0] else parts[0]
            net.host.nft(f"add element {name} {{ {' . '.join([head, *parts[1:]])} }}")

    by_text()
    assert in_first_tables(net.host.ruleset()) == in_first_tables(by_engine)


def in_first_tables(ruleset: str) -> str:
    """Of the tables that the program may change."""
    return "".join(table for table in ruleset.split("table ") if table.split()[1:2] == ["hostd"])


async def test_one_to_remove_may_be_absent_and_one_to_add_may_be_there(nft: Nft) -> None:
    await with_base(nft)
    await nft.run(lambda tables: tables.change(add=MEMBERS))

    await nft.run(lambda tables: tables.change(remove=[STRAY], add=MEMBERS))

    assert await nft.members(PINS) == {MEMBERS[1][1]}
    assert await nft.run(lambda tables: tables.has(MEMBERS))
    assert not await nft.run(lambda tables: tables.has([*MEMBERS, STRAY]))
    assert await nft.run(lambda tables: tables.present([*MEMBERS, STRAY])) == list(MEMBERS)
    assert await nft.run(lambda tables: tables.missing([*MEMBERS, STRAY])) == [STRAY]
    assert await nft.run(lambda tables: tables.members_of(PINS, "tn3i5")) == {MEMBERS[1][1]}
    assert await nft.run(lambda tables: tables.members_of(PINS, "tn3i6")) == set()


async def test_where_a_set_is_missing_nothing_is_changed(net: HostNet, nft: Nft) -> None:
    await with_base(nft)
    net.host.nft("delete table inet hostd")
    before = net.host.ruleset()

    with pytest.raises(Absent):
        await nft.run(lambda tables: tables.change(add=MEMBERS))

    assert net.host.ruleset() == before
    assert not await nft.run(lambda tables: tables.has(MEMBERS))


async def test_own_changes_are_not_outside_changes(nft: Nft) -> None:
    await with_base(nft)
    before = await nft.outside_changes()

    await nft.run(lambda tables: tables.change(add=MEMBERS))
    await nft.run(lambda tables: tables.apply("flush set bridge hostd pins\n"))

    assert await nft.outside_changes() == before
    assert await nft.members(PINS) <= {MEMBERS[1][1]}, "the guard's copy may have it"


async def test_a_change_of_hostds_tables_by_another_is_noticed(net: HostNet, nft: Nft) -> None:
    await with_base(nft)
    await nft.run(lambda tables: tables.change(add=MEMBERS))
    before = await nft.outside_changes()

    net.host.nft("flush set inet hostd tenants")

    assert await nft.outside_changes() > before
    assert await nft.run(lambda tables: tables.missing([MEMBERS[2]])) == [MEMBERS[2]]


async def test_a_change_of_another_table_is_none(net: HostNet, nft: Nft) -> None:
    await with_base(nft)
    before = await nft.outside_changes()
    foreign = await nft.run(lambda tables: tables.foreign_commits())

    net.host.nft("add table inet other\nadd set inet other tenants { type ifname; }")
    await nft.run(lambda tables: tables.change(add=MEMBERS))
    net.host.nft("delete table inet other")

    assert await nft.outside_changes() == before
    assert await nft.run(lambda tables: tables.foreign_commits()) > foreign
    assert await nft.run(lambda tables: tables.has(MEMBERS))


async def test_changes_by_another_between_the_look_and_the_commit_are_noticed(
    net: HostNet,
) -> None:
    """The batch is for one generation of the ruleset: the kernel refuses it for another one."""
    nft = Nft(net.host.enter, lambda: Racing(net))
    try:
        await with_base(nft)
        before = await nft.outside_changes()

        await nft.run(lambda tables: tables.change(add=MEMBERS))

        assert await nft.outside_changes() > before
        assert await nft.run(lambda tables: tables.has(MEMBERS))
        assert await nft.members(GUESTS) == {("tn3i5",), ("tn3i9",)}
    finally:
        nft.close()


class RacingSocket(socket.socket):
    """Just before the first batch is sent, another program commits."""

    race: Callable[[], None] | None = None

    def send(self, data: "ReadableBuffer", flags: int = 0, /) -> int:
        if self.race is not None:
            race, self.race = self.race, None
            race()
        return super().send(data, flags)


class Racing(Library):
    def __init__(self, net: HostNet) -> None:
        super().__init__()
        assert self.socket is not None
        racing = RacingSocket(fileno=self.socket.detach())
        racing.race = lambda: net.host.nft('add element bridge hostd guests { "tn3i9" }')
        self.socket: socket.socket | None = racing


async def test_a_refused_transaction_is_a_fault_of_the_host(nft: Nft) -> None:
    await with_base(nft)

    with pytest.raises(HostFault):
        await nft.run(lambda tables: tables.change(add=[("inet hostd nothing", ("x",))]))
