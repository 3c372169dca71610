"""Values of the state bucket, and the headers of dead letters. Types only."""

from typing import Literal, NotRequired, TypedDict

from schemas.protocol.facts import HostFacts, HostState
from schemas.records import Status


class InstanceState(TypedDict):
    """The newest state of an instance; Destroy deletes the key."""

    v: Literal[1]
    status: Status
    journal_id: str
    seq: int
    at_ms: int
    since_ms: int
    launch: int
    revision: str | None
    command_id: str | None
    reason: str | None


class NetworkState(TypedDict):
    """The newest state of a tenant's network; Teardown deletes the key."""

    v: Literal[1]
    status: Literal["up", "down"]
    journal_id: str
    seq: int
    at_ms: int
    since_ms: int
    bridge_name: str
    ipv4_subnet: str


class HostValue(HostFacts):
    """The lease of a host, with its facts; a reader relies on `lease_until_ms`."""

    v: Literal[1]
    status: HostState
    journal_id: str
    seq: int
    at_ms: int
    machine_id: str
    product_uuid: str
    macs: list[str]
    hostname: str
    worker_id: str
    lease_until_ms: int


DeadHeaders = TypedDict(
    "DeadHeaders",
    {
        "Nats-Msg-Id": str,
        "Hostd-Sha256": str,
        "Hostd-Reason": str,
        "Hostd-Truncated": NotRequired[str],
        "traceparent": NotRequired[str],
        "tracestate": NotRequired[str],
    },
)
DeadHeaders.__doc__ = "Headers of a dead letter; its payload is the original bytes."
