"""What is hostd's by its mark, but belongs to nothing the journal knows: counted, not removed.

A command in the midst of its work looks like that for a moment, so only what was seen in two
passes running counts.
"""

from collections.abc import Iterable

from handlers.host.inventory import Inventory
from handlers.network_names import names_of
from handlers.specs import ArtifactSpec
from schemas.records import InstanceRecord, NetworkRecord

Found = set[tuple[str, str]]


def unowned(
    inventory: Inventory, instances: Iterable[InstanceRecord], networks: Iterable[NetworkRecord]
) -> Found:
    """(kind, name) of each jail, TAP, bridge, cgroup and artifact that no record stands for."""
    records = list(instances)
    live = [record for record in records if record.holds_host]
    jails = {record.jail_id for record in live}
    taps = {names.tap for record in live if (names := names_of(record)) is not None}
    bridges = {record.net.bridge_name for record in networks}
    revisions = {key for record in records if (key := ArtifactSpec.key_of(record)) is not None}
    found: Found = set()
    found |= {("jails", name) for name in inventory.jails if name not in jails}
    found |= {("taps", name) for name in inventory.taps if name not in taps}
    found |= {("bridges", name) for name in inventory.bridges if name not in bridges}
    found |= {
        ("cgroups", name) for name in inventory.cgroups if name.rpartition("/")[2] not in jails
    }
    found |= {
        ("artifacts", path)
        for path in inventory.artifacts
        if not any(path.endswith(f"/{key}") for key in revisions)
    }
    return found


def counted(before: Found, now: Found) -> dict[str, int]:
    """How many of each kind were there in both passes."""
    counts: dict[str, int] = {}
    for kind, _ in before & now:
        counts[kind] = counts.get(kind, 0) + 1
    return counts
