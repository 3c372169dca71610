"""Facts about hosts and VMMs that several messages contain. Types only."""

from typing import Literal, NotRequired, TypedDict

HostState = Literal["recovering", "ready", "draining", "degraded"]
Trouble = Literal[
    "journal", "disk_full", "disk_watermark", "hung_calls", "vmm_versions", "launches"
]

Evidence = Literal["kernel", "cgroup", "log", "hostd", "none"]


class Capacity(TypedDict):
    """What agentd schedules by."""

    instances: int
    vcpus: int
    vcpus_used: int
    mem_mib: int
    mem_free_mib: int
    disk_free_mib: int


class VmmVersion(TypedDict):
    """One version of Firecracker that is installed, or that an instance needs."""

    version: str
    state: Literal["installed", "removed", "changed", "missing", "refused", "unknown"]
    starts: bool
    running: int
    sleeping: int


class HostFacts(TypedDict):
    """State and capacity of a host, in a Pong and in the host's value."""

    version: str
    commit: str
    boot_id: str
    host_state: HostState
    degraded_by: list[Trouble]
    limits_enforced: bool
    capacity: Capacity
    warm_vmms: int
    vmm_versions: list[VmmVersion]


class ProtocolRange(TypedDict):
    """The versions of `HostdRequest` that a host takes."""

    min: int
    max: int


class VmmEndFacts(TypedDict):
    """Why a VMM ended without a command."""

    reason: str
    evidence: Evidence
    launch: int
    at_ms: int
    code: NotRequired[int]
    signal: NotRequired[int]


class VmmEndText(VmmEndFacts):
    """The same with a sentence for an operator."""

    text: str


class LastEnd(TypedDict):
    """Why the last VMM of an instance ended that ended without a command."""

    reason: str
    evidence: Evidence
    launch: int
    at_ms: int
    code: int | None
    signal: int | None
    text: str


class FoundFact(TypedDict):
    """One fact that was looked at before an instance was adopted or released."""

    fact: str
    found: str
