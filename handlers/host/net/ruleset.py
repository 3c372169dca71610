"""Puts the tables of `chains` in force, with the elements that the settings and the policy give.

Membership of tenants and guests is that of `tenant_rules` and `antispoof`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from handlers.errors import Failure, HostFault, Unavailable
from handlers.host.net.chains import (
    CARRIED,
    CARRIED_POLICY,
    CHAINS,
    GUARD,
    SETS,
    TABLE,
    base_script,
    expected_layout,
    layout_in,
    layout_of,
)
from handlers.host.net.nft.elements import Element, Member
from handlers.host.net.nft.nftables import Nft, Tables, spelled
from handlers.host.net.policy_file import PolicyFile
from schemas.network_policy import NetworkPolicy, denied_networks
from schemas.settings import NetworkSettings

TENANT_ALLOWED, TENANT_DENIED = "inet hostd tenant_allowed", "inet hostd tenant_denied"
SERVICES, UPLINKS, DENIED = "inet hostd services", "inet hostd uplinks", "inet hostd denied"
# Changes of others by then, settings, policy and uplinks.
ElementsLeft = tuple[int, NetworkSettings, NetworkPolicy, tuple[str, ...] | None]


@dataclass(slots=True)
class Wanted:
    """Elements that are to go, that are to be there, and the sets that get a new content."""

    remove: list[Member] = field(default_factory=list[Member])
    add: list[Member] = field(default_factory=list[Member])
    replace: dict[str, set[Element]] = field(default_factory=dict[str, set[Element]])


class BaseRules:
    """The two tables. `ensure` costs next to nothing while no other hand touches them.

    Knows the tenant of each bridge whose rules are in force: to whom `policy` applies.
    """

    def __init__(self, nft: Nft, settings: NetworkSettings) -> None:
        self.nft = nft
        self.policy = PolicyFile(settings.policy)
        self._tenants: dict[str, str] = {}
        self._settings = settings
        self._script = base_script(settings.max_flows)
        self._guard_script = base_script(settings.max_flows, guard=True)
        self._left: tuple[int, str] | None = None
        self._guard_left: tuple[int, str] | None = None
        self._joined: set[str] = set()
        self._elements_left: ElementsLeft | None = None

    async def ensure(self, uplinks: Iterable[str] | None = None) -> bool:
        """Put the tables in force if anything of them is missing or changed; true if so.

        One transaction, membership kept. `uplinks` None keeps those that are set. Making the guard
        is no change: each worker makes its own.

        Raises:
            HostFault: the read-back differs from what was set, or another process owns the guard.
        """
        return await self.nft.run(lambda tables: self.ensure_in(tables, uplinks))

    def reload(self, settings: NetworkSettings, policy: PolicyFile) -> None:
        """Take other `denied`, `allowed`, `host_services` and `policy`; `ensure` applies them."""
        self.policy = policy
        self._settings = settings

    def join(self, bridge: str, tenant_id: str) -> None:
        """The rules of this bridge are about to be in force; the next `ensure` applies `policy`."""
        if self._tenants.get(bridge) != tenant_id:
            self._tenants[bridge] = tenant_id
            self._joined.add(bridge)

    def leave(self, bridge: str) -> None:
        """The rules of this bridge are about to end."""
        self._tenants.pop(bridge, None)
        self._joined.discard(bridge)

    def ensure_in(self, tables: Tables, uplinks: Iterable[str] | None = None) -> bool:
        """`ensure` for a mechanism that runs in the nftables thread already."""
        changed = not self._holds(tables)
        if changed:
            self._apply(tables)
            self._elements_left = None
        changed = self._ensure_elements(tables, uplinks) or changed
        if tables.can_own:
            self._ensure_guard(tables)
        return changed

    def _ensure_guard(self, tables: Tables) -> None:
        """Make the guard with the members of the tables, unless it is there."""
        now = tables.outside_changes()
        if self._guard_left is not None and tables.guarded:  # else made by a thread that hangs
            changes, listing = self._guard_left
            if now == changes or guard_listing(tables) == listing:
                self._guard_left = (now, listing)
                return
        self._guard_left = None
        script = ""
        members = ""
        for family, sets in SETS.items():
            if tables.text(f"{family} {GUARD}"):
                script += f"delete table {family} {GUARD}\n"
            for name in (name for name, spec in sets.items() if "dynamic" not in spec):
                for element in tables.members(f"{family} {TABLE} {name}"):
                    members += f"add element {spelled((f'{family} {GUARD} {name}', element))}\n"
        tables.guarded = False  # until it is known to be; its members are those of either copy
        try:
            tables.apply(script + self._guard_script + members)
        except Failure as error:
            if self.nft.hangs:
                raise Unavailable(
                    f"cannot change the nftables tables {GUARD}: a call that hangs owns them; try "
                    "again when it has returned"
                ) from error
            raise HostFault(
                f"cannot make the nftables tables {GUARD}: {error.message}; only one worker per "
                "network namespace can own them: stop the other one"
            ) from error
        listing = guard_listing(tables)
        if layout_in(listing) != expected_layout():
            raise HostFault(f"nftables read-back failed: {GUARD} differs from what was set")
        tables.guarded = True
        self._guard_left = (now, listing)

    def _holds(self, tables: Tables) -> bool:
        """Whether the tables are as they were left; read only after another hand's change."""
        if self._left is None:
            return False
        changes, listing = self._left
        now = tables.outside_changes()
        if now != changes and listing_of(tables) != listing:
            return False
        self._left = (now, listing)
        return True

    def _apply(self, tables: Tables) -> None:
        """Flush and fill the chains; where what is there does not fit, replace the tables."""
        self._left = None
        changes = tables.outside_changes()
        try:
            tables.apply(self._script)
            listing = listing_of(tables)
            fits = layout_of(json.loads(listing)) == expected_layout()
        except Failure:
            listing, fits = "", False
        if not fits:
            self._rebuild(tables)
            listing = listing_of(tables)
            if layout_of(json.loads(listing)) != expected_layout():
                raise HostFault("nftables read-back failed: base ruleset differs from what was set")
        self._left = (changes, listing)

    def _ensure_elements(self, tables: Tables, uplinks: Iterable[str] | None) -> bool:
        """One transaction, so nothing is open in between that neither old nor new settings open.

        What they were left as is looked at again after another hand's change, or if other ones are
        asked for; of tenants that have joined since, only theirs.
        """
        now = tables.outside_changes()
        asked = None if uplinks is None else tuple(uplinks)
        left = self._elements_left
        same = left is not None and left[:3] == (now, self._settings, self.policy.current)
        if same and left is not None and asked in {None, left[3]}:
            return self._concerned(tables) and self._change(tables, self._of_joined(tables))
        changed = self._change(tables, self._of_all(tables, asked))
        before = left[3] if same and left is not None else None
        uplinks_left = before if asked is None else asked  # none at all is an answer, too
        self._elements_left = (now, self._settings, self.policy.current, uplinks_left)
        return changed

    def _concerned(self, tables: Tables) -> bool:
        """Whether the policy concerns a tenant that has joined, or has left elements for it."""
        policy = self.policy.current
        for bridge in self._joined:
            tenant = self._tenants.get(bridge, "")
            if tenant in policy.allowed or tenant in policy.denied:
                return True
            if any(tables.members_of(name, bridge) for name in (TENANT_ALLOWED, TENANT_DENIED)):
                return True
        self._joined.clear()
        return False

    def _of_joined(self, tables: Tables) -> Wanted:
        """The elements that the policy gives the tenants that have joined."""
        joined = {each: self._tenants[each] for each in self._joined if each in self._tenants}
        return self._of_policy(tables, joined)

    def _of_all(self, tables: Tables, uplinks: tuple[str, ...] | None) -> Wanted:
        """The elements that the settings, and the policy of all tenants, give."""
        services = (service.partition("/") for service in self._settings.host_services)
        wanted: dict[str, set[Element]] = {SERVICES: {(kind, port) for kind, _, port in services}}
        if uplinks is not None:
            wanted[UPLINKS] = {(name,) for name in uplinks}
        found = self._of_policy(tables, self._tenants)
        for name, elements in wanted.items():
            found.remove += [(name, each) for each in sorted(tables.members(name) - elements)]
            found.add += [(name, each) for each in sorted(elements)]
        denied: set[Element] = {(network,) for network in denied_networks(self._settings)}
        if tables.members(DENIED) != denied or tables.missing([(DENIED, e) for e in denied]):
            found.replace[DENIED] = denied
        return found

    def _of_policy(self, tables: Tables, tenants: Mapping[str, str]) -> Wanted:
        """Of these bridges and their tenants; what other bridges have is left alone."""
        found = Wanted()
        policy = self.policy.current
        for name, networks in ((TENANT_ALLOWED, policy.allowed), (TENANT_DENIED, policy.denied)):
            for bridge, tenant in sorted(tenants.items()):
                wanted = {(bridge, network) for network in networks.get(tenant, ())}
                there = tables.members_of(name, bridge)
                found.remove += [(name, element) for element in sorted(there - wanted)]
                found.add += [(name, element) for element in sorted(wanted)]
        return found

    def _change(self, tables: Tables, wanted: Wanted) -> bool:
        """Make what differs so, in one transaction; true if anything did."""
        add = tables.missing(wanted.add)
        changed = bool(wanted.remove or add or wanted.replace)
        if changed:
            tables.change(remove=wanted.remove, add=add, replace=wanted.replace)
        self._joined.clear()
        return changed

    def _rebuild(self, tables: Tables) -> None:
        """Replace tables of another layout by ours, guests and tenants kept, in one transaction."""
        drop = "".join(
            f"add table {family} {TABLE}\ndelete table {family} {TABLE}\n" for family in CARRIED
        )
        carried = "".join(
            f"add element {spelled((f'{family} {TABLE} {name}', element))}\n"
            for family, names in CARRIED.items()
            for name in (*names, *(CARRIED_POLICY if family == "inet" else ()))
            for element in tables.members(f"{family} {TABLE} {name}")
        )
        tables.apply(drop + self._script + carried)


def guard_listing(tables: Tables) -> str:
    """The guard's tables without their elements, as one comparable text."""
    return "".join(tables.text(f"{family} {GUARD}") for family in CHAINS)


def listing_of(tables: Tables) -> str:
    """Both tables without their elements, as one comparable text."""
    listed: list[dict[str, Any]] = []
    for family in CHAINS:
        listed += tables.read(f"table {family} {TABLE}", terse=True)
    return json.dumps([without_handle(entry) for entry in listed], sort_keys=True)


def without_handle(entry: dict[str, Any]) -> dict[str, Any]:
    volatile = {"handle", "packets", "bytes"}
    return {
        kind: {name: value for name, value in body.items() if name not in volatile}
        for kind, body in entry.items()
    }
