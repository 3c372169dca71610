"""The queries `ask.<verb>`: what they take and what they answer. Types only.

`REQUESTS` are what a worker decodes; `ANSWERS` are what `worker/queries/answers.py` returns.
"""

from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from schemas.codes import Code
from schemas.protocol.facts import HostState, LastEnd
from schemas.records import Status
from schemas.usage import InstanceUsage, TenantUsage

NetworkStatus = Literal["up", "down"]
Effect = Literal["waits", "supersedes", "hurries"]
PlannedOutcome = Literal["done", "found", "failed"]


class AskNothing(msgspec.Struct, frozen=True):
    """A query without arguments. Unknown keys are ignored, as in each query."""


class AskDescribe(msgspec.Struct, frozen=True):
    """Which instance; or, without `pool_id` and `instance_id`, which tenant's network."""

    tenant_id: str
    pool_id: str | None = None
    instance_id: str | None = None


class AskUsage(msgspec.Struct, frozen=True):
    """Which instance; or, without `pool_id` and `instance_id`, which tenant."""

    tenant_id: str
    pool_id: str | None = None
    instance_id: str | None = None


class AskResult(msgspec.Struct, frozen=True):
    """Which command."""

    id: str


class AskExplain(msgspec.Struct, frozen=True):
    """A request as in a command; one that is invalid is answered with the reason in `refused`."""

    request: Any


class PingAnswer(TypedDict):
    """The worker answers."""

    v: Literal[1]
    host_id: str
    host_state: HostState
    uptime_s: int


class StatusAnswer(TypedDict):
    """The host in numbers."""

    v: Literal[1]
    host_id: str
    host_state: HostState
    boot_id: str
    journal_id: str
    unfinished: int
    lanes: dict[str, int]
    instances: dict[str, int]


class ListedInstance(TypedDict):
    """One instance of a list."""

    tenant_id: str
    pool_id: str
    instance_id: str
    status: Status
    since_ms: int


class ListedNetwork(TypedDict):
    """One network of a list."""

    tenant_id: str
    bridge_name: str
    status: NetworkStatus


class ListAnswer(TypedDict):
    """All instances and networks of the host."""

    v: Literal[1]
    journal_id: str
    seq: int
    instances: list[ListedInstance]
    networks: list[ListedNetwork]
    warm_vmms: int


class InstanceAnswer(TypedDict):
    """One instance."""

    v: Literal[1]
    tenant_id: str
    pool_id: str
    instance_id: str
    status: Status
    since_ms: int
    launch: int
    jail_id: str | None
    pid: int | None
    uid_slot: int | None
    offset: int | None
    revision: str | None
    vcpus: int
    mem_mib: int
    snapshot: int | None
    command_id: str | None
    hung_since_ms: int | None
    last_end: LastEnd | None


class InstanceOfTenant(TypedDict):
    """One instance of a tenant."""

    pool_id: str
    instance_id: str
    status: Status


class NetworkAnswer(TypedDict):
    """One tenant's network."""

    v: Literal[1]
    tenant_id: str
    status: NetworkStatus
    since_ms: int
    tenant_net_id: int
    ipv4_subnet: str
    gateway_ip: str
    bridge_name: str
    instances: list[InstanceOfTenant]


class ResultAnswer(TypedDict):
    """State and reply of a command."""

    v: Literal[1]
    id: str
    state: Literal["waiting", "running", "done"]
    request_digest: NotRequired[str]
    reply: NotRequired[Any]


class CommandBefore(TypedDict):
    """A command that is before this one in its lane."""

    id: str
    type: str
    state: Literal["running", "waiting"]
    effect: Effect


class Refusal(TypedDict):
    """As the reply of the command would have it."""

    code: Code
    message: str
    retryable: bool
    detail: dict[str, Any]


class ExplainedStep(TypedDict):
    """One step that the command would take."""

    name: str
    outcome: PlannedOutcome
    key: NotRequired[str]
    there: NotRequired[bool | None]


class ExplainAnswer(TypedDict):
    """What a command would do now, and why."""

    v: Literal[1]
    type: str | None
    lane: str | None
    before: list[CommandBefore]
    provisional: bool
    refused: Refusal | None
    changes: bool
    status: str | None
    why: str | None
    waits: list[str]
    steps: list[ExplainedStep]


class AskError(TypedDict):
    """Why a query was not answered."""

    code: Code
    message: str


class ErrorAnswer(TypedDict):
    """In place of each answer."""

    error: AskError


REQUESTS: dict[str, type] = {
    "ping": AskNothing,
    "status": AskNothing,
    "list": AskNothing,
    "describe": AskDescribe,
    "usage": AskUsage,
    "result": AskResult,
    "explain": AskExplain,
}
ANSWERS: dict[str, tuple[type, ...]] = {
    "ping": (PingAnswer,),
    "status": (StatusAnswer,),
    "list": (ListAnswer,),
    "describe": (InstanceAnswer, NetworkAnswer),
    "usage": (InstanceUsage, TenantUsage),
    "result": (ResultAnswer,),
    "explain": (ExplainAnswer,),
}
