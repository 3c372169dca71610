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

import re
from typing import Any

TABLE, GUARD = "hostd", "hostd_guard"

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
        # Where guests do not go; which tenants do nevertheless; where single tenants do not go.
        "denied": "type ipv4_addr; flags interval;",
        "tenant_allowed": "type ifname . ipv4_addr; flags interval;",
        "tenant_denied": "type ifname . ipv4_addr; flags interval;",
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
CARRIED_POLICY = ("denied", "tenant_allowed", "tenant_denied")
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
            # Each packet, not only the first: a flow ends when its target is denied.
            "iifname . ip daddr @tenant_allowed goto to_uplink",
            "iifname . ip daddr @tenant_denied goto drop_from",
            "ip daddr @denied goto drop_from",
            "goto to_uplink",
        ),
        "to_uplink": (
            "",
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


def layout_in(text: str) -> dict[str, int]:
    """The same, counted in nft's text."""
    layout: dict[str, int] = {}
    family = chain = ""
    for line in text.splitlines():
        words = line.split()
        if line.startswith("table "):
            family = words[1]
        elif line.endswith("{") and line[:1] == "\t" != line[1:2]:
            chain = f"{family} {words[0]} {words[1]}"
            layout[chain] = 0
        elif " chain " in chain and line.startswith("\t\ttype "):
            count = layout.pop(chain)
            chain = f"{chain} {hook_of(line)}"
            layout[chain] = count
        elif " chain " in chain and line.startswith("\t\t"):
            layout[chain] += 1
    return layout


def hook_of(declaration: str) -> str:
    """`forward accept` of `type filter hook forward priority filter; policy accept;`."""
    words = declaration.replace(";", "").split()
    return f"{words[words.index('hook') + 1]} {words[-1]}" if words else ""
