"""Which resources with hostd's mark belong to nothing that the journal knows. Pure.

What a command makes is in the journal before it is on the host: its row (`step_log`) or the record
of its reservation. So what was found on the host first, and is in neither afterwards, belongs to no
command that runs.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from handlers.claims.orphan import Orphan
from handlers.claims.unrecorded import UnrecordedVmm
from handlers.mechanism import StepRow
from handlers.network_names import names_of
from handlers.specs import ArtifactSpec, SnapshotKey
from schemas import naming
from schemas.records import InstanceRecord, NetworkRecord
from schemas.requests import InstanceRef

NUMBER = re.compile(r"[0-9]{1,18}")
REMOVED: Final = ("taps", "bridges", "nft", "cgroups", "jails", "snapshots", "artifacts", "temp")
"""The kinds of the inventory that are removed, in this order: a TAP before its bridge."""

NOT_REMOVED: Final[Mapping[str, str]] = {
    "processes": "a VMM without a record is never killed; it books what it holds",
    "sockets": "they go with their jail",
    "disks": "they are names of a jail, and go with it",
    "warm": "the warm pool removes what an earlier worker left when it starts",
}


class Inventory(Protocol):
    """Names of what carries hostd's mark, by kind."""

    @property
    def jails(self) -> Sequence[str]: ...
    @property
    def taps(self) -> Sequence[str]: ...
    @property
    def bridges(self) -> Sequence[str]: ...
    @property
    def nft(self) -> Sequence[str]: ...
    @property
    def cgroups(self) -> Sequence[str]: ...
    @property
    def snapshots(self) -> Sequence[str]: ...
    @property
    def artifacts(self) -> Sequence[str]: ...
    @property
    def temp(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class Known:
    """What the journal says at one moment, and what was found out beside it.

    Attributes:
        rows: of the step log, of unfinished commands and of what finished ones left behind.
        busy: instances, networks' tenants (`t`) and the like with an unfinished command.
        revisions: that a snapshot or a jail without a record refers to, as `t/p/revision`.
        data, state: `[paths]`.
    """

    instances: Sequence[InstanceRecord]
    networks: Sequence[NetworkRecord]
    rows: Iterable[StepRow]
    busy: frozenset[str]
    unrecorded: Sequence[UnrecordedVmm]
    revisions: frozenset[str]
    data: str
    state: str


def find_orphans(inventory: Inventory, known: Known) -> dict[Orphan, str]:
    """Each orphan, with why it must be kept for now; empty if nothing is against its removal."""
    owned, held = owned_by_records(known), held_otherwise(known)
    return {
        orphan: held.reason(orphan)
        for kind in REMOVED
        for name in getattr(inventory, kind)
        if not owned.has(orphan := Orphan(kind, name))
    }


def snapshot_key(name: str) -> SnapshotKey | None:
    """The snapshot `t/p/i/n`; None if it is a directory of another name, which is left alone."""
    *ids, number = name.split("/")
    valid = len(ids) == 3 and all(map(naming.ID_PATTERN.fullmatch, ids))
    if not valid or NUMBER.fullmatch(number) is None:
        return None
    return SnapshotKey(InstanceRef(*ids), int(number))


def interface_of(orphan: Orphan) -> str | None:
    """The interface that a TAP, a bridge or an element of nftables is, or is about."""
    if orphan.kind in {"taps", "bridges"}:
        return orphan.name
    if orphan.kind == "nft":
        return orphan.name.split(" ", 2)[2].split(" . ")[0]
    return None


def net_id_of(orphan: Orphan) -> int | None:
    """The tenant's network that an interface belongs to by its name."""
    name = interface_of(orphan) or ""
    match = naming.TAP_NAME_PATTERN.fullmatch(name) or naming.BRIDGE_NAME_PATTERN.fullmatch(name)
    return None if match is None else int(match[1])


def place_of(orphan: Orphan, known: Known) -> Sequence[str]:
    """Tenant, pool and instance in the path of a file, as far as it has them."""
    if orphan.kind in {"snapshots", "artifacts"}:
        return orphan.name.split("/")[: 3 if orphan.kind == "snapshots" else 2]
    for base in (f"{known.state}/snapshots/", f"{known.state}/logs/"):
        if orphan.name.startswith(base):
            return orphan.name.removeprefix(base).split("/")[:3]
    if orphan.name.startswith(base := f"{known.state}/artifacts/"):
        return orphan.name.removeprefix(base).split("/")[:2]
    if orphan.name.startswith(base := f"{known.data}/tenants/"):
        return orphan.name.removeprefix(base).split("/")[:1]
    return ()


def tenant_of(orphan: Orphan, data: str) -> str | None:
    """In whose directory of `[paths] data` it is, where agentd can make such names; None: none."""
    base = f"{data}/tenants/"
    if orphan.kind != "temp" or not orphan.name.startswith(base):
        return None
    return orphan.name.removeprefix(base).split("/")[0]


def instance_of_files(orphan: Orphan, known: Known) -> InstanceRef | None:
    """The instance that a snapshot or temporary file belongs to, by its path."""
    place = place_of(orphan, known) if orphan.kind in {"snapshots", "temp"} else ()
    valid = len(place) == 3 and all(naming.ID_PATTERN.fullmatch(each) for each in place)
    return InstanceRef(*place) if valid else None


@dataclass(frozen=True, slots=True)
class Owned:
    """What belongs to the records of instances and networks."""

    jails: frozenset[str]
    interfaces: frozenset[str]
    revisions: frozenset[str]
    records: Mapping[InstanceRef, InstanceRecord]
    known: Known

    def has(self, orphan: Orphan) -> bool:
        match orphan.kind:
            case "taps" | "bridges" | "nft":
                return interface_of(orphan) in self.interfaces
            case "jails":
                return orphan.name in self.jails
            case "cgroups":
                return orphan.name.rpartition("/")[2] in self.jails
            case "artifacts":
                return orphan.name in self.revisions
            case "snapshots":
                return not self._stale(orphan.name)
            case "temp":
                return self._may_map(orphan)
            case _:
                return False

    def _may_map(self, orphan: Orphan) -> bool:
        """A VM that was woken maps the memory in its snapshot, also if its jail was removed."""
        ref = instance_of_files(orphan, self.known)
        record = None if ref is None else self.records.get(ref)
        return record is not None and (record.holds_host or record.before is not None)

    def _stale(self, name: str) -> bool:
        """A snapshot that can never be woken: the instance was launched again since.

        Without a record it may be all that is left of an instance that sleeps.
        """
        key = snapshot_key(name)
        record = None if key is None else self.records.get(key.ref)
        return (
            record is not None
            and key is not None
            and record.before is None
            and record.snapshot != key.number
            and record.launch > key.number
        )


def owned_by_records(known: Known) -> Owned:
    live = [each for each in known.instances if each.holds_host or each.before is not None]
    taps = {names.tap for each in live if (names := names_of(each)) is not None}
    keys = {key for each in known.instances if (key := ArtifactSpec.key_of(each)) is not None}
    return Owned(
        jails=frozenset(each.jail_id for each in live),
        interfaces=frozenset(taps | {each.net.bridge_name for each in known.networks}),
        revisions=frozenset(keys | known.revisions),
        records={each.ref: each for each in known.instances},
        known=known,
    )


@dataclass(frozen=True, slots=True)
class Held:
    """What keeps an orphan from being removed."""

    rows: frozenset[str]
    busy: frozenset[str]
    vmms: Mapping[str, int]
    known: Known

    def reason(self, orphan: Orphan) -> str:
        interface = interface_of(orphan)
        last = orphan.name.rpartition("/")[2]
        names = {orphan.name, interface or "", last if orphan.kind == "cgroups" else ""} - {""}
        if names & self.rows:
            return "a command is unfinished, or has left it behind for the next pass"
        if (used := names & self.vmms.keys()) or (
            used := self._bridge_of_a_vmm(orphan) or self._files_of_a_vmm(orphan)
        ):
            return f"process {self.vmms[used.pop()]}, a VMM without a record, uses it"
        if orphan.kind == "jails" and orphan.name.partition("-")[0] in self.busy:
            return "a command of its instance is unfinished"
        place = place_of(orphan, self.known)
        if any("/".join(place[:n]) in self.busy for n in range(1, len(place) + 1)):
            return "a command of its tenant or instance is unfinished"
        if orphan.kind == "temp" and not place and self.busy:
            return "commands are unfinished"
        return ""

    def _files_of_a_vmm(self, orphan: Orphan) -> set[str]:
        """A VMM may map files of its instance's snapshots."""
        ref = instance_of_files(orphan, self.known)
        if ref is None:
            return set()
        prefix = naming.jail_id_prefix(ref)
        return {name for name in self.vmms if name.startswith(prefix)}

    def _bridge_of_a_vmm(self, orphan: Orphan) -> set[str]:
        """A bridge, and its rules, are needed by the VMMs whose TAPs are of its network."""
        net_id = net_id_of(orphan)
        prefix = "" if net_id is None else naming.tap_name_prefix(net_id)
        if (
            interface_of(orphan) is None
            or not prefix
            or not (interface_of(orphan) or "").startswith("br-")
        ):
            return set()
        return {name for name in self.vmms if name.startswith(prefix)}


def held_otherwise(known: Known) -> Held:
    vmms: dict[str, int] = {}
    for each in known.unrecorded:
        vmms |= dict.fromkeys([*each.taps, *filter(None, [each.process.jail_id])], each.process.pid)
    return Held(
        rows=frozenset(name for row in known.rows for name in names_of_row(row)),
        busy=known.busy,
        vmms=vmms,
        known=known,
    )


def names_of_row(row: StepRow) -> set[str]:
    """By what names the inventory may list the resource of a row."""
    names = {row.key, row.key.rpartition("/")[2], row.key.replace("#", "/")}
    first, comma, _ = row.key.partition(",")
    if comma:  # a pin is about its TAP, a tenant's rules about its bridge
        names.add(naming.bridge_name(int(first)) if first.isdecimal() else first)
    return names


def busy_names(refs: Iterable[InstanceRef], tenants: Iterable[str]) -> frozenset[str]:
    """Instances with unfinished commands, as `t/p/i`, their pools and tenants, and the part of
    their jail IDs that is the same in all; and the tenants of networks with such commands."""
    names = set(tenants)
    for ref in refs:
        names |= {ref.tenant_id, f"{ref.tenant_id}/{ref.pool_id}", str(ref)}
        names.add(naming.jail_id_prefix(ref).rstrip("-"))
    return frozenset(names)


def counts_of(orphans: Iterable[Orphan]) -> dict[str, int]:
    """How many of each kind."""
    counts: dict[str, int] = {}
    for orphan in orphans:
        counts[orphan.kind] = counts.get(orphan.kind, 0) + 1
    return counts
