"""Resources that carry hostd's mark and belong to no record: counted, not removed.

A command that is running looks like that for a moment, so a resource counts only when two passes
in a row found it.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from handlers.network_names import names_of
from schemas.records import InstanceRecord, NetworkRecord

Resources = set[tuple[str, str]]
"""(kind, name) of each."""


class Inventory(Protocol):
    """Names of what carries hostd's mark, by kind."""

    @property
    def jails(self) -> Sequence[str]: ...
    @property
    def taps(self) -> Sequence[str]: ...
    @property
    def bridges(self) -> Sequence[str]: ...
    @property
    def cgroups(self) -> Sequence[str]: ...
    @property
    def artifacts(self) -> Sequence[str]: ...


def unowned(
    inventory: Inventory, instances: Iterable[InstanceRecord], networks: Iterable[NetworkRecord]
) -> Resources:
    """Each jail, TAP, bridge, cgroup and artifact that belongs to no record."""
    records = list(instances)
    live = [record for record in records if record.holds_host]
    jails = {record.jail_id for record in live}
    taps = {names.tap for record in live if (names := names_of(record)) is not None}
    bridges = {record.net.bridge_name for record in networks}
    revisions = {
        f"{record.ref.tenant_id}/{record.ref.pool_id}/{record.revision}" for record in records
    }
    resources: Resources = set()
    resources |= {("jails", name) for name in inventory.jails if name not in jails}
    resources |= {("taps", name) for name in inventory.taps if name not in taps}
    resources |= {("bridges", name) for name in inventory.bridges if name not in bridges}
    resources |= {
        ("cgroups", name) for name in inventory.cgroups if name.rpartition("/")[2] not in jails
    }
    resources |= {
        ("artifacts", path)
        for path in inventory.artifacts
        if not any(path.endswith(revision) for revision in revisions)
    }
    return resources


def count_in_both(before: Resources, now: Resources) -> dict[str, int]:
    """How many of each kind both passes found."""
    counts: dict[str, int] = {}
    for kind, _ in before & now:
        counts[kind] = counts.get(kind, 0) + 1
    return counts
