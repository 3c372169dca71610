"""Elements of hostd's nftables sets that name no interface: what is left of a tenant or a guest.

An element is known by the text that the inventory prints: `<family> <set> <part> . <part>`, the
first part being the interface.
"""

from handlers.errors import Conflict, Invalid
from handlers.host.net.chains import CARRIED
from handlers.host.net.nft.elements import Member
from handlers.host.net.nft.nftables import Nft, Tables
from handlers.host.net.rtnetlink import Netlink
from handlers.host.net.ruleset import BaseRules

SEPARATOR = " . "


def parse_element(text: str) -> Member:
    """Raises Invalid: it is not an element of a set whose elements are tenants' or guests'."""
    family, _, rest = text.partition(" ")
    kind, _, parts = rest.partition(" ")
    if kind not in CARRIED.get(family, ()) or not parts:
        raise Invalid(f"no element of a tenant or guest: {text[:200]!r}")
    return f"{family} hostd {kind}", tuple(parts.split(SEPARATOR))


async def remove_unused_element(text: str, nft: Nft, base: BaseRules, netlink: Netlink) -> None:
    """Remove one element; absent is success.

    Raises:
        Conflict: its interface exists: the element holds it to its rules.
    """
    name, element = parse_element(text)
    link = await netlink.run(lambda kernel: kernel.link(element[0]))
    if link is not None:
        raise Conflict(f"interface {element[0]} of element {text!r} exists")

    def remove(tables: Tables) -> None:
        if doomed := tables.present([(name, element)]):
            base.ensure_in(tables)
            tables.change(remove=doomed)

    await nft.run(remove)
