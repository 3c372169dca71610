"""hostd's own two tables: what every tenant's and every guest's traffic is held to.

The rules are fixed; tenants and guests are elements of sets, so a packet's way is as long with 500
tenants as with one. The tables judge only what comes from or goes to a tenant's bridge: the
operator's own forwarding, and what other tables say, is untouched. Forbidden packets are counted
and dropped, never rejected. The tables stay when there is no tenant.

Both tables exist twice. `hostd` outlives the worker. `hostd_guard` has the same rules one priority
later and is owned by the worker's netlink socket: no other program can flush or change it, so what
is done to `hostd` lets nothing pass. Elements are changed in both in one transaction.

Why a flow counts by its direction: a flow that the outside opened while the rules were gone (a
flushed ruleset) must not live on as "established" when they are back.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from handlers.errors import Failure, HostFault
from handlers.host.net.nftables import GUARD, TABLE, Element, Member, Nft, Tables, spelled
from schemas.settings import NetworkSettings

# Per tenant, and per guest.
ECHO_RATE = "iifname limit rate over 20/second burst 40 packets"
ARP_RATE = "iifname limit rate over 100/second burst 200 packets"
ECHO_TO_GATEWAY = "iifname . ip daddr @gateways icmp type echo-request"
# Frames to 01:80:c2:00:00:0x (802.1X and others) pass by prerouting and go to the host's own
# sockets. LLDP goes there past every hook of this family; only a listener on the TAP sees it.
LINK_LOCAL = "ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00"

SETS = {
    "inet": {
        "uplinks": "type ifname;",
        "services": "type inet_proto . inet_service;",
        "tenants": "type ifname;",
        "gateways": "type ifname . ipv4_addr;",
        "dropped": "type ifname; counter;",
        "echo_rates": "type ifname; size 65535; flags dynamic,timeout; timeout 1m;",
        "flows": "type ifname; size 65535; flags dynamic;",
    },
    "bridge": {
        "guests": "type ifname;",
        "pins": "type ifname . ether_addr . ipv4_addr;",
        "arp_rates": "type ifname; size 65535; flags dynamic,timeout; timeout 1m;",
    },
}
# Membership that a new layout takes over from an old one, in the same transaction.
CARRIED = {"inet": ("tenants", "gateways", "dropped"), "bridge": ("guests", "pins")}
COUNTERS = ("spoofed", "spoofed_arp", "other", "link_local")

CHAINS: dict[str, dict[str, tuple[str, ...]]] = {
    "inet": {
        "forward": (
            "type filter hook forward priority filter; policy accept;",
            "iifname @tenants jump from_tenant",
            "oifname @tenants jump to_tenant",
        ),
        "from_tenant": (
            "",
            "meta nfproto != ipv4 goto drop_from",
            "ip daddr 169.254.0.0/16 goto drop_from",
            "ct state invalid goto drop_from",
            # Per tenant, so that none can fill the host's connection tracking table.
            "ct state new add @flows { iifname ct count over MAX_FLOWS } goto drop_from",
            "oifname @uplinks ct direction original accept",
            "goto drop_from",
        ),
        "to_tenant": (
            "",
            "ct state established,related ct direction reply accept",
            "goto drop_to",
        ),
        "input": (
            "type filter hook input priority filter; policy accept;",
            "iifname @tenants jump from_guest",
        ),
        "from_guest": (
            "",
            "meta nfproto != ipv4 goto drop_from",
            "ct state established,related ct direction reply accept",
            f"{ECHO_TO_GATEWAY} update @echo_rates {{ {ECHO_RATE} }} goto drop_from",
            f"{ECHO_TO_GATEWAY} accept",
            "iifname . ip daddr @gateways meta l4proto . th dport @services accept",
            "goto drop_from",
        ),
        "drop_from": ("", "iifname @dropped drop", "drop"),
        "drop_to": ("", "oifname @dropped drop", "drop"),
        "postrouting": (
            "type nat hook postrouting priority srcnat; policy accept;",
            "iifname @tenants oifname @uplinks masquerade",
        ),
    },
    "bridge": {
        "prerouting": (
            "type filter hook prerouting priority -300; policy accept;",
            "iifname @guests jump from_guest",
        ),
        "input": (
            "type filter hook input priority -300; policy accept;",
            f"iifname @guests {LINK_LOCAL} counter name link_local drop",
        ),
        "from_guest": (
            "",
            "ether type arp goto arp_from_guest",
            "ether type ip iifname . ether saddr . ip saddr @pins accept",
            "ether type ip counter name spoofed drop",
            "counter name other drop",
        ),
        "arp_from_guest": (
            "",
            "arp operation != { request, reply } counter name other drop",
            "iifname . ether saddr . arp saddr ip != @pins counter name spoofed_arp drop",
            "iifname . arp saddr ether . arp saddr ip != @pins counter name spoofed_arp drop",
            f"update @arp_rates {{ {ARP_RATE} }} counter name other drop",
            "accept",
        ),
    },
}


class BaseRules:
    """The two tables. `ensure` costs next to nothing while no other hand touches any ruleset."""

    def __init__(self, nft: Nft, settings: NetworkSettings) -> None:
        self._nft = nft
        self._services = {
            (protocol, port)
            for protocol, _, port in (service.partition("/") for service in settings.host_services)
        }
        self._script = base_script(settings.max_flows)
        self._guard_script = base_script(settings.max_flows, guard=True)
        self._left: tuple[int, str] | None = None
        self._guard_left: tuple[int, str] | None = None

    async def ensure(self, uplinks: Iterable[str] | None = None) -> bool:
        """Put the tables in force if anything of them is missing or changed; true if so.

        One transaction, membership kept. `uplinks` None keeps those that are set. Making the guard
        is no change: each worker makes its own.

        Raises:
            HostFault: the read-back differs from what was set, or another process owns the guard.
        """
        return await self._nft.run(lambda tables: self.ensure_in(tables, uplinks))

    def ensure_in(self, tables: Tables, uplinks: Iterable[str] | None = None) -> bool:
        """`ensure` for a mechanism that runs in the nftables thread already."""
        changed = not self._holds(tables)
        if changed:
            self._apply(tables)
        changed = self._ensure_elements(tables, uplinks) or changed
        if tables.can_own:
            self._ensure_guard(tables)
        return changed

    def _ensure_guard(self, tables: Tables) -> None:
        """Make the guard with the members of the tables, unless it is there."""
        now = tables.outside_changes()
        if self._guard_left is not None:
            changes, listing = self._guard_left
            if now == changes or listing_of(tables, GUARD) == listing:
                self._guard_left = (now, listing)
                return
        self._guard_left = None
        tables.guarded = False
        script = ""
        members = ""
        for family, sets in SETS.items():
            if tables.read(f"table {family} {GUARD}", terse=True):
                script += f"delete table {family} {GUARD}\n"
            for name in (name for name, spec in sets.items() if "dynamic" not in spec):
                for element in tables.members(f"{family} {TABLE} {name}"):
                    members += f"add element {spelled((f'{family} {GUARD} {name}', element))}\n"
        try:
            tables.apply(script + self._guard_script + members)
        except Failure as error:
            raise HostFault(
                f"cannot make the nftables tables {GUARD}: {error.message}; only one worker per "
                "network namespace can own them: stop the other one"
            ) from error
        listing = listing_of(tables, GUARD)
        if layout_of(json.loads(listing)) != expected_layout():
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
        wanted: dict[str, set[Element]] = {"inet hostd services": set(self._services)}
        if uplinks is not None:
            wanted["inet hostd uplinks"] = {(name,) for name in uplinks}
        remove: list[Member] = []
        add: list[Member] = []
        for name, elements in wanted.items():
            remove += [(name, element) for element in sorted(tables.members(name) - elements)]
            add += tables.missing([(name, element) for element in sorted(elements)])
        if remove or add:
            tables.change(remove=remove, add=add)
        return bool(remove or add)

    def _rebuild(self, tables: Tables) -> None:
        """Replace tables of another layout by ours, guests and tenants kept, in one transaction."""
        script = ""
        carried = ""
        for family, names in CARRIED.items():
            script += f"add table {family} hostd\ndelete table {family} hostd\n"
            for name in names:
                for element in tables.members(f"{family} hostd {name}"):
                    carried += f"add element {spelled((f'{family} hostd {name}', element))}\n"
        tables.apply(script + self._script + carried)


def listing_of(tables: Tables, table: str = TABLE) -> str:
    """Both tables of this name without their elements, as one comparable text."""
    listed: list[dict[str, Any]] = []
    for family in CHAINS:
        listed += tables.read(f"table {family} {table}", terse=True)
    return json.dumps([without_handle(entry) for entry in listed], sort_keys=True)


def base_script(max_flows: int, *, guard: bool = False) -> str:
    """The transaction that makes both tables, keeping elements; repeating it changes nothing.

    With `guard` those of the guard: owned by the socket that sends it, one priority later.
    """
    lines: list[str] = []
    table = GUARD if guard else TABLE
    for family, chains in CHAINS.items():
        lines += [f"table {family} {table} {{"]
        lines += ["  flags owner;"] if guard else []
        lines += [f"  set {name} {{ {spec} }}" for name, spec in SETS[family].items()]
        if family == "bridge":
            lines += [f"  counter {name} {{ }}" for name in COUNTERS]
        for name, rules in chains.items():
            declaration = one_later(rules[0]) if guard else rules[0]
            lines += [f"  chain {name} {{ {declaration} }}"]
        lines += ["}"]
        lines += [f"flush chain {family} {table} {name}" for name in chains]
        lines += [
            f"add rule {family} {table} {name} {rule}".replace("MAX_FLOWS", str(max_flows))
            for name, rules in chains.items()
            for rule in rules[1:]
        ]
    return "\n".join(lines) + "\n"


def one_later(declaration: str) -> str:
    """The declaration of a base chain with the next priority."""
    return re.sub(
        r"priority (\S+);",
        lambda found: (
            f"priority {int(found[1]) + 1};"
            if found[1].startswith("-")
            else f"priority {found[1]} + 1;"
        ),
        declaration,
    )


def expected_layout() -> dict[str, int]:
    """What must be there: chains with their number of rules, sets and counters with 0."""
    layout = {
        f"{family} chain {name} {hook_of(rules[0])}".strip(): len(rules) - 1
        for family, chains in CHAINS.items()
        for name, rules in chains.items()
    }
    layout |= {f"{family} set {name}": 0 for family, sets in SETS.items() for name in sets}
    return layout | {f"bridge counter {name}": 0 for name in COUNTERS}


def layout_of(listing: list[dict[str, Any]]) -> dict[str, int]:
    """The same, counted in what nft lists."""
    layout: dict[str, int] = {}
    names: dict[tuple[str, str], str] = {}
    for kind, body in (item for entry in listing for item in entry.items()):
        family = body["family"]
        if kind == "chain":
            hook = f"{body['hook']} {body['policy']}" if "hook" in body else ""
            names[family, body["name"]] = f"{family} chain {body['name']} {hook}".strip()
            layout[names[family, body["name"]]] = 0
        elif kind == "rule":
            layout[names[family, body["chain"]]] += 1
        elif kind != "table":
            layout[f"{family} {kind} {body['name']}"] = 0
    return layout


def hook_of(declaration: str) -> str:
    """`forward accept` of `type filter hook forward priority filter; policy accept;`."""
    words = declaration.replace(";", "").split()
    return f"{words[words.index('hook') + 1]} {words[-1]}" if words else ""


def without_handle(entry: dict[str, Any]) -> dict[str, Any]:
    volatile = {"handle", "packets", "bytes"}
    return {
        kind: {name: value for name, value in body.items() if name not in volatile}
        for kind, body in entry.items()
    }
