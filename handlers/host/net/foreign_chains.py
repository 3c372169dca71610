"""Chains of other tables that drop guests' packets: an accept of hostd's tables is not final.

A base chain with policy `drop` on a hook that guests' packets pass drops all that no rule of its
own table accepts. Whether a rule does cannot be told in general; a table that names tenants'
bridges or TAPs is taken to. Not seen: rules that drop, and chains of `iptables-legacy`.
"""

import re

from handlers.host.net.chains import GUARD, TABLE
from handlers.host.net.nft.nftables import Tables

HOOKS = {
    "ip": {"prerouting", "forward", "postrouting"},
    "inet": {"ingress", "prerouting", "forward", "postrouting"},
    "bridge": {"prerouting", "forward", "postrouting"},
}
OURS = re.compile(r'"(br-tenant-|tn[0-9*])')


def foreign_drops(tables: Tables) -> tuple[str, ...]:
    """The chains, e.g. `ip filter FORWARD`, in the order of nft's listing."""
    suspects = [
        (chain["family"], chain["table"], chain["name"])
        for entry in tables.read("chains")
        for kind, chain in entry.items()
        if kind == "chain"
        and chain.get("policy") == "drop"
        and chain.get("hook") in HOOKS.get(chain["family"], ())
        and chain["table"] not in {TABLE, GUARD}
    ]
    names_us = {
        (family, table): mentions_guests(tables.text(f"{family} {table}", terse=False))
        for family, table, _ in suspects
    }
    return tuple(" ".join(chain) for chain in suspects if not names_us[chain[:2]])


def mentions_guests(listing: str) -> bool:
    """Whether a string in nft's text begins as the names of tenants' bridges or TAPs do."""
    return OURS.search(listing) is not None
