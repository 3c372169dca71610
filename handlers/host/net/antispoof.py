"""Anti-spoofing: the one MAC and IPv4 address that a TAP may send from (its pin).

A pin is made before the TAP is up. A port that is pinned is held to its pins by the bridge table,
for IPv4 and inside ARP; all other protocols from it are dropped.
"""

from typing import ClassVar

from handlers.errors import HostFault
from handlers.host.net.nft.elements import Member
from handlers.host.net.nft.nftables import Nft, Tables
from handlers.host.net.ruleset import BaseRules
from handlers.mechanism import Durability
from handlers.specs import PinSpec

GUESTS, PINS = "bridge hostd guests", "bridge hostd pins"


class Pins:
    """Pins by `<tap>,<mac>,<address>`. `ensure` is true if anything had to be made or repaired.

    Source: nft(8). Needs: CAP_NET_ADMIN.
    """

    name: ClassVar[str] = "pin"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = True

    def __init__(self, nft: Nft, base: BaseRules) -> None:
        self._nft = nft
        self._base = base

    async def exists(self, key: str) -> bool:
        wanted = pin_members(key)
        return await self._nft.run(lambda tables: len(tables.missing(wanted)) < len(wanted))

    async def ensure(self, spec: PinSpec) -> bool:
        """Pin the TAP to this MAC and address alone, base rules in force, and read it back.

        Raises:
            HostFault: the read-back differs from what was set: the TAP must not be set up.
        """
        return await self._nft.run(lambda tables: self._ensure_in(tables, spec))

    async def remove(self, key: str) -> None:
        def remove_members(tables: Tables) -> None:
            doomed = tables.present(pin_members(key))
            if doomed:
                self._base.ensure_in(tables)
                tables.change(remove=doomed)

        await self._nft.run(remove_members)

    def _ensure_in(self, tables: Tables, spec: PinSpec) -> bool:
        changed = self._base.ensure_in(tables)
        wanted = pin_members(spec.key)
        stray = [
            (PINS, element)
            for element in tables.members_of(PINS, spec.tap)
            if (PINS, element) not in wanted
        ]
        if not stray and not tables.missing(wanted):
            return changed
        tables.change(remove=stray, add=wanted)
        if not tables.has(wanted):
            raise HostFault(
                f"nftables read-back failed: anti-spoofing entry for {spec.tap} missing"
            )
        return True


def pin_members(key: str) -> tuple[Member, Member]:
    """What makes the bridge table hold a TAP to its pin."""
    pin = PinSpec.parse(key)
    return (GUESTS, (pin.tap,)), (PINS, (pin.tap, pin.mac, pin.guest_ip))
