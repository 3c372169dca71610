"""Hypothesis strategies for every type of the wire, and writers for the forms that serde takes."""

from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from schemas import codec
from schemas.codes import Code
from schemas.envelopes import Command, Event, EventKind, Form, Reply, StepTaken
from schemas.naming import COMMAND_ID_PATTERN, ID_PATTERN, bridge_name
from schemas.requests import (
    DestroyInstance,
    Error,
    Ok,
    Ping,
    Pong,
    Request,
    Response,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    TenantNet,
    WakeInstance,
)

# The same examples in each run; a busy machine is no reason to fail.
BOUNDED = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

ids = st.from_regex(ID_PATTERN, fullmatch=True)
command_ids = st.from_regex(COMMAND_ID_PATTERN, fullmatch=True)
u64 = st.integers(0, 2**64 - 1)
times = st.integers(0, codec.TIME_MAX_MS)
text = st.text(max_size=40)
workspaces = st.none() | text
nets = st.builds(
    TenantNet,
    tenant_net_id=st.integers(0, 4095),
    ipv4_subnet=text,
    gateway_ip=text,
    bridge_name=text,
)
requests: st.SearchStrategy[Request] = st.one_of(
    st.builds(StartInstance, ids, ids, ids, workspaces),
    st.builds(StopInstance, ids, ids, ids, workspaces),
    st.builds(SleepInstance, ids, ids, ids, st.booleans(), st.none() | u64, workspaces),
    st.builds(WakeInstance, ids, ids, ids, workspaces),
    st.builds(DestroyInstance, ids, ids, ids, st.booleans(), workspaces),
    st.builds(SetupNetwork, ids, nets),
    st.builds(TeardownNetwork, ids, nets),
    st.just(Ping()),
)
taken_nets = st.integers(0, 4095).map(
    lambda n: TenantNet(
        n, f"10.{240 + n // 256}.{n % 256}.0/24", f"10.{240 + n // 256}.{n % 256}.1", bridge_name(n)
    )
)
taken_requests: st.SearchStrategy[Request] = st.one_of(
    requests.filter(lambda request: not isinstance(request, SetupNetwork | TeardownNetwork)),
    st.builds(SetupNetwork, ids, taken_nets),
    st.builds(TeardownNetwork, ids, taken_nets),
)
taken_inboxes = st.none() | st.from_regex(r"_INBOX(\.[A-Za-z0-9]{1,20}){1,3}", fullmatch=True)
responses: st.SearchStrategy[Response] = st.one_of(
    st.just(Ok()), st.just(Pong()), st.builds(Error, text)
)
details = st.dictionaries(
    text,
    st.recursive(
        st.none() | st.booleans() | u64 | st.integers(-(2**63), -1) | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@st.composite
def commands(draw: st.DrawFn, *, taken: bool = False) -> Command:
    """What decodes; with `taken`, also what a worker with the default settings takes."""
    request = draw(taken_requests if taken else requests)
    later = getattr(request, "workspace_id", None) is not None
    units = isinstance(request, Ping)
    return Command(
        id=draw(command_ids),
        request=request,
        form=Form.NAMED if units else draw(st.sampled_from(Form)),
        issued_at_ms=draw(st.none() | times),
        deadline_ms=draw(st.none() | times),
        reply_to=draw(taken_inboxes if taken else workspaces),
        issuer=draw(workspaces),
        traceparent=draw(workspaces),
        tracestate=draw(workspaces),
        protocol=2 if later else 1,
    )


replies = st.builds(
    Reply,
    v=st.just(1),
    id=command_ids,
    host_id=text,
    response=responses,
    code=st.sampled_from(Code),
    retryable=st.booleans(),
    changed=st.booleans(),
    status=workspaces,
    attempts=st.integers(0, 2**32 - 1),
    replayed=st.booleans(),
    received_at_ms=times,
    finished_at_ms=times,
    steps=st.lists(st.builds(StepTaken, text, u64, text), max_size=4).map(tuple),
    left_behind=st.lists(text, max_size=3).map(tuple),
    supported=st.lists(text, max_size=3).map(tuple),
    detail=details,
    traceparent=workspaces,
    tracestate=workspaces,
)
events = st.builds(
    Event,
    v=st.just(1),
    id=text,
    host_id=text,
    boot_id=text,
    journal_id=text,
    seq=u64,
    at_ms=u64,
    kind=st.sampled_from(EventKind),
    tenant_id=workspaces,
    pool_id=workspaces,
    instance_id=workspaces,
    from_=workspaces,
    to=workspaces,
    command_id=workspaces,
    reason=workspaces,
    detail=details,
    traceparent=workspaces,
    tracestate=workspaces,
)


@st.composite
def written(draw: st.DrawFn, value: Request) -> object:
    """A request as some serde could write it: each Struct in its own form, maps in any order,
    fields that have defaults left out where they may be."""
    if isinstance(value, Ping):
        return draw(st.sampled_from(["Ping", {"Ping": None}]))
    return {type(value).__name__: _struct_anyhow(draw, value)}


def _struct_anyhow(draw: st.DrawFn, value: msgspec.Struct) -> object:
    infos = msgspec.structs.fields(value)
    fields: list[tuple[str, Any]] = []
    for info in infos:
        item = getattr(value, info.name)
        if isinstance(item, msgspec.Struct):
            item = _struct_anyhow(draw, item)
        fields.append((info.name, msgspec.to_builtins(item, builtin_types=(bytes,))))
    spare = {info.name for info in infos if not info.required}
    if draw(st.booleans()):
        while fields and fields[-1][0] in spare and fields[-1][1] in (None, []):
            if draw(st.booleans()):
                break
            fields.pop()
        return [item for _, item in fields]
    kept = [
        (name, item)
        for name, item in fields
        if name not in spare or item not in (None, []) or draw(st.booleans())
    ]
    return dict(draw(st.permutations(kept)))
