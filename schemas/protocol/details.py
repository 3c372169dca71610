"""`detail` of events by kind, and of replies: what hostd puts there. Types only.

A kind with several types has one of them. A Pong's `detail` and what a command did are complete; a
failure may have further facts of its own, which are for people.
"""

from typing import Any, Literal, NotRequired, TypedDict

from schemas.codes import Code
from schemas.envelopes import EventKind
from schemas.protocol.facts import FoundFact, HostFacts, ProtocolRange, VmmEndFacts, VmmEndText
from schemas.usage import Totals, UsageDetail

Act = Literal["sender", "scheduler", "operator"]
Drained = Literal["acknowledged", "refused", "no_answer", "no_agent", "forced", "unknown"]


class Nothing(TypedDict):
    """An empty map."""


class Shortened(TypedDict):
    """In place of the detail of a message that was too long."""

    shortened_from_bytes: int


class WithTotals(TypedDict):
    """The record of an instance is gone; what it has used."""

    totals: Totals


class CommandEnded(TypedDict):
    """A command ended; its reply has more."""

    type: str
    code: Code
    changed: bool
    attempts: int
    message: NotRequired[str]
    vmm_log: NotRequired[str]


class VmmExited(VmmEndFacts):
    """A VMM ended without a command."""

    log_tail: str


class VmmHung(TypedDict):
    """A VMM does not answer its API, or answers again."""

    hung: bool
    launch: int
    pid: int | None
    misses: NotRequired[int]


class NetworkWarnings(TypedDict):
    """What on the host keeps guests from the network."""

    warnings: list[str]


class Drifted(TypedDict):
    """Somebody else changed what hostd keeps."""

    repaired: list[str]
    lost: list[str]


class RemovedLeftover(TypedDict):
    """Something that a command left behind was removed."""

    mechanism: str
    key: str


class RemovedOrphan(TypedDict):
    """An orphan was removed, or its removal failed."""

    kind: str
    name: str
    by: str
    result: str


class QuarantinedVmm(TypedDict):
    """A VMM that no record explains; it is left alone."""

    jail: str


class QuarantinedRow(TypedDict):
    """A row of the journal that this version cannot read; it is kept."""

    table: str
    key: str
    error: str


class SnapshotHashed(TypedDict):
    """The memory file of a snapshot was hashed."""

    snapshot: int
    mem_sha256: str


class SleptUndrained(TypedDict):
    """A guest was put to sleep that did not acknowledge the drain."""

    drain: Drained
    drain_reason: NotRequired[str]


class WokeUntold(TypedDict):
    """A guest woke whose agent was not told so, or whose clock was not set."""

    agent_failed: NotRequired[str]
    clock_failed: NotRequired[str]


class RecoveryDone(TypedDict):
    """A worker has started; counts of what it found."""

    adopted: int
    ended: int
    quarantined: int
    networks: int
    failed: int
    commands: int


class Adopted(TypedDict):
    """An operator had an instance adopted; on what proof."""

    status: str
    proved: list[FoundFact]
    not_proved: list[FoundFact]


class DiskChanged(TypedDict):
    """Disk space became short, or is there again."""

    low: bool
    above_watermark: bool
    free_bytes: int
    used_percent: float


class Released(TypedDict):
    """An operator gave up the record of an instance; nothing was killed or removed."""

    status: str
    launch: int
    jails: list[str]
    pids: list[int]


class DrainOfHost(TypedDict):
    """A drain began, goes on or has ended."""

    active: bool
    mode: Literal["wait", "sleep", "stop"]
    drain: str
    in_use: NotRequired[int]
    in_progress: NotRequired[int]
    done: NotRequired[int]
    failed: NotRequired[int]
    unknown: NotRequired[int]


class VersionUse(TypedDict):
    """How many instances need a version of Firecracker."""

    running: int
    sleeping: int


class VersionsInTrouble(TypedDict):
    """Versions of Firecracker that instances need and that are missing or changed."""

    versions: dict[str, VersionUse]


class OrphansLeft(TypedDict):
    """The sweep stopped for this hour."""

    per_hour: int
    left: dict[str, int]


class LaunchesQuarantined(TypedDict):
    """The host takes no Start after launches that failed by its own fault, or takes them again."""

    launches_quarantined: bool
    failures: NotRequired[int]
    step: NotRequired[str]


DETAILS: dict[EventKind, tuple[type, ...]] = {
    EventKind.STATUS: (Nothing, VmmEndFacts, WithTotals),
    EventKind.COMMAND: (CommandEnded,),
    EventKind.VMM_EXITED: (VmmExited,),
    EventKind.VMM_HUNG: (VmmHung,),
    EventKind.NETWORK: (Nothing, NetworkWarnings),
    EventKind.DRIFT: (Drifted,),
    EventKind.REMOVED: (RemovedLeftover, RemovedOrphan),
    EventKind.QUARANTINED: (Nothing, QuarantinedVmm, QuarantinedRow),
    EventKind.SNAPSHOT: (SnapshotHashed, SleptUndrained, WokeUntold),
    EventKind.RECOVERED: (Nothing, RecoveryDone, Adopted),
    EventKind.DISK: (DiskChanged,),
    EventKind.RELEASED: (Released,),
    EventKind.DRAIN: (DrainOfHost,),
    EventKind.VMM_VERSIONS: (VersionsInTrouble,),
    EventKind.ORPHANS: (OrphansLeft,),
    EventKind.HOST: (LaunchesQuarantined,),
    EventKind.USAGE: (UsageDetail,),
}


# -- replies -----------------------------------------------------------------------------------


class PongDetail(HostFacts):
    """Of a Pong."""

    protocol: ProtocolRange
    uptime_s: int


class DoneDetail(TypedDict, total=False):
    """Of `Ok`: what the command did; which keys depends on the command."""

    pid: int
    launch: int
    tap: str
    method: str
    snapshot: int
    size_bytes: int
    drain: Drained
    drain_reason: str
    agent_failed: str
    clock_failed: str
    clock_was_off_s: float
    volumes: Literal["wiped", "kept"]
    absent: bool
    bridge_name: str
    warnings: list[str]
    shortened_from_bytes: int


class ErrorDetail(TypedDict, total=False):
    """Of an error: who must act, which field is at fault, and facts of this failure."""

    act: Act
    path: str
    claimed_id: str
    status: str
    http_status: int
    errno: str
    by: str
    budget: str
    unit: str
    asked: int
    used: int
    limit: int
    vmm_log: str
    vmm_end: VmmEndText
    used_by: list[dict[str, Any]]
    shortened_from_bytes: int
