"""The queries of a worker, and their answers: `await client.ask(host, queries.status())`.

A field that a newer hostd adds is ignored. One that an older hostd lacks has its default, if it has
one here; else, as with those of `usage` and `tenant_usage`, the answer is `BadAnswer`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from schemas.requests import InstanceRef, Request
from schemas.serde import REQUEST
from schemas.usage import InstanceUsage, TenantUsage

__all__ = [
    "CommandResult",
    "Explanation",
    "HostPing",
    "HostStatus",
    "InstanceShown",
    "ListedInstance",
    "ListedNetwork",
    "Listing",
    "NetworkShown",
    "Query",
    "explain",
    "instance",
    "listing",
    "network",
    "ping",
    "result",
    "status",
    "tenant_usage",
    "usage",
]

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Query(Generic[A]):
    """One question: the last token of its subject, its body, and the type of its answer."""

    verb: str
    body: Mapping[str, object]
    answer: type[A]


class HostPing(msgspec.Struct, frozen=True, kw_only=True):
    """`host_state`: recovering, ready, draining or degraded."""

    host_id: str
    host_state: str
    uptime_s: int


class HostStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of unfinished commands, by lane too, and of instances by status."""

    host_id: str
    host_state: str
    boot_id: str
    journal_id: str
    unfinished: int
    lanes: dict[str, int]
    instances: dict[str, int]


class ListedInstance(msgspec.Struct, frozen=True, kw_only=True):
    """`since_ms`: Unix milliseconds, of its status."""

    tenant_id: str
    pool_id: str
    instance_id: str
    status: str
    since_ms: int

    @property
    def ref(self) -> InstanceRef:
        return InstanceRef(self.tenant_id, self.pool_id, self.instance_id)


class ListedNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """The network of a tenant."""

    tenant_id: str
    bridge_name: str
    status: str


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """All that a host has, as of event `seq` of `journal_id` (`EventFeed.after`).

    `journal_id` and `seq` are None from a hostd that does not say them.
    """

    journal_id: str | None = None
    seq: int | None = None
    instances: tuple[ListedInstance, ...]
    networks: tuple[ListedNetwork, ...]
    warm_vmms: int = 0


class InstanceShown(msgspec.Struct, frozen=True, kw_only=True):
    """One instance. `last_end` says why its last VMM ended without a command; sizes in MiB."""

    tenant_id: str
    pool_id: str
    instance_id: str
    status: str
    since_ms: int
    launch: int
    vcpus: int
    mem_mib: int
    pid: int | None = None
    jail_id: str | None = None
    revision: str | None = None
    snapshot: int | None = None
    command_id: str | None = None
    hung_since_ms: int | None = None
    last_end: dict[str, Any] | None = None


class NetworkShown(msgspec.Struct, frozen=True, kw_only=True):
    """The network of a tenant, and its instances as maps `pool_id`, `instance_id`, `status`."""

    tenant_id: str
    status: str
    since_ms: int
    tenant_net_id: int
    ipv4_subnet: str
    gateway_ip: str
    bridge_name: str
    instances: tuple[dict[str, str], ...] = ()


class CommandResult(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: waiting, running or done; `reply`: the reply envelope as a map, once it is done.

    `request_digest` says of which request (docs/contract.md); None from an older hostd, too.
    """

    id: str
    state: str
    request_digest: str | None = None
    reply: dict[str, Any] | None = None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What a command would do now; the contract, section 9, Explain, has the fields."""

    type: str | None = None
    lane: str | None = None
    before: tuple[dict[str, Any], ...] = ()
    provisional: bool = False
    refused: dict[str, Any] | None = None
    changes: bool = False
    status: str | None = None
    why: str | None = None
    waits: tuple[str, ...] = ()
    steps: tuple[dict[str, Any], ...] = ()


def ping() -> Query[HostPing]:
    """Whether a worker runs, and in which state; the cheapest query."""
    return Query("ping", {}, HostPing)


def status() -> Query[HostStatus]:
    """Numbers of the whole host."""
    return Query("status", {}, HostStatus)


def listing() -> Query[Listing]:
    """All instances and networks, from the journal: never older than a published event."""
    return Query("list", {}, Listing)


def instance(ref: InstanceRef) -> Query[InstanceShown]:
    """One instance in full. `NotFound` if the host does not know it."""
    return Query("describe", _ids(ref), InstanceShown)


def network(tenant_id: str) -> Query[NetworkShown]:
    """A tenant's network. `NotFound` if the host has none."""
    return Query("describe", {"tenant_id": tenant_id}, NetworkShown)


def usage(ref: InstanceRef) -> Query[InstanceUsage]:
    """What an instance uses and has used. `NotFound` if the host does not know it."""
    return Query("usage", _ids(ref), InstanceUsage)


def tenant_usage(tenant_id: str) -> Query[TenantUsage]:
    """The sums over a tenant's instances on this host; what was destroyed is not in them."""
    return Query("usage", {"tenant_id": tenant_id}, TenantUsage)


def result(command_id: str) -> Query[CommandResult]:
    """How far a command is. `NotFound` if the journal does not have it, or no longer."""
    return Query("result", {"id": command_id}, CommandResult)


def explain(request: Request) -> Query[Explanation]:
    """What a command with this request would do, without doing it."""
    return Query("explain", {"request": REQUEST.write(request)}, Explanation)


def _ids(ref: InstanceRef) -> Mapping[str, object]:
    return {"tenant_id": ref.tenant_id, "pool_id": ref.pool_id, "instance_id": ref.instance_id}
