"""The NATS accounts of a cell: who may use which subject, as data, and as server configuration.

One account per role. A permission lists the subjects that a client may publish to, never the reply
subjects that it may name, and the server answers a request with rights of its own: inside one
account, whoever may send one JetStream request can make the server publish anywhere. Between
accounts only what is exported and imported crosses, a reply included, so JetStream's account has no
users, and each host and each agentd has an account that imports what it needs (ADR 0206).

Nobody but the administrator may create a stream, and a consumer only a mirror's server besides:
`deliver_subject`, `republish`, `sources` and `mirror` make the server publish, or read, in
JetStream's account.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from schemas.subjects import Subjects
from worker.bus import streams

OWNER = "HOSTD"
ADMIN = "ADMIN"
DASHBOARD = "DASHBOARD"
MIRROR = "MIRROR"  # a server that keeps copies for dashboards
SYSTEM = "SYS"


def host_account(host_id: str) -> str:
    return f"HOST_{host_id}"


def agentd_account(host_id: str) -> str:
    return f"AGENTD_{host_id}"


def discovery_subject(subjects: Subjects) -> str:
    """Where dashboards find this host's `$SRV.>`: one `$SRV.>` per account could be one host's."""
    return f"{subjects.root}.{subjects.host_id}.srv.>"


def advisory_subjects(subjects: Subjects) -> tuple[str, ...]:
    """Where the server reports changes of the streams and of this host's consumer."""
    names = tuple(str(config["name"]) for config in streams.stream_configs(subjects))
    consumer = f"{subjects.commands_stream}.{subjects.consumer}"
    return (
        *(f"$JS.EVENT.ADVISORY.STREAM.*.{name}" for name in names),
        f"$JS.EVENT.ADVISORY.CONSUMER.*.{consumer}",
    )


@dataclass(frozen=True, slots=True)
class Grant:
    """`owner` exports `subject` and each of `to` imports it.

    Attributes:
        kind: a service takes requests and publications of the importer; a stream is what the
            exporter's clients publish.
        many: one request may get several answers.
        local: the importer's name of the subject; "" is the same name.
    """

    kind: Literal["service", "stream"]
    owner: str
    subject: str
    to: tuple[str, ...]
    many: bool = False
    local: str = ""


def grants(
    subjects: Subjects, hosts: Sequence[str], js_domain: str, *, mirror: bool = False
) -> tuple[Grant, ...]:
    """All exports and imports of a cell with these hosts, and of its mirrors if there are any."""
    api = streams.js_api(js_domain)
    found = [
        Grant("service", OWNER, "$JS.API.>", (ADMIN,), many=True),
        *_info_grants(subjects, hosts),
        *_dashboard_grants(subjects),
        *(_mirror_grants(subjects) if mirror else ()),
    ]
    for host in hosts:
        found += _host_grants(replace(subjects, host_id=host))
    return tuple(
        replace(grant, local=grant.subject.replace("$JS.API.", api, 1))
        if grant.subject.startswith("$JS.API.") and grant.to != (ADMIN,)
        else grant
        for grant in found
    )


def _mirror_grants(subjects: Subjects) -> Iterator[Grant]:
    """A server that mirrors a stream makes a push consumer of it (ADR 1079)."""
    for config in streams.mirror_configs(subjects, ""):
        name = config["name"]
        create = f"$JS.API.CONSUMER.CREATE.{name}"
        yield Grant("service", OWNER, create, (MIRROR,))
        yield Grant("service", OWNER, f"{create}.>", (MIRROR,))
        yield Grant("service", OWNER, f"$JS.FC.{name}.>", (MIRROR,))  # flow control
    yield Grant("stream", OWNER, f"{streams.mirror_delivery(subjects)}.>", (MIRROR,))


def _stream_names(subjects: Subjects) -> tuple[str, ...]:
    return tuple(str(config["name"]) for config in streams.stream_configs(subjects))


def _info_grants(subjects: Subjects, hosts: Sequence[str]) -> Iterator[Grant]:
    """Hosts compare the configurations with what they need."""
    for name in _stream_names(subjects):
        shown = (DASHBOARD,) if name in _shown(subjects) else ()
        to = tuple(map(host_account, hosts)) + shown
        yield Grant("service", OWNER, f"$JS.API.STREAM.INFO.{name}", to)
        for event in ("UPDATED", "DELETED"):
            advisory = f"$JS.EVENT.ADVISORY.STREAM.{event}.{name}"
            yield Grant("stream", OWNER, advisory, tuple(map(host_account, hosts)))


def _shown(subjects: Subjects) -> tuple[str, ...]:
    """What dashboards read of all hosts: no commands, no replies (ADR 1072)."""
    return tuple(str(config["name"]) for config in streams.mirror_configs(subjects, ""))


def _dashboard_grants(subjects: Subjects) -> Iterator[Grant]:
    """History is read message by message: a consumer of its own would be more than reading."""
    for name in _shown(subjects):
        get = f"$JS.API.DIRECT.GET.{name}"
        yield Grant("service", OWNER, get, (DASHBOARD,), many=True)
        yield Grant("service", OWNER, f"{get}.>", (DASHBOARD,))


def _host_grants(subjects: Subjects) -> Iterator[Grant]:
    own = f"{subjects.root}.{subjects.host_id}"
    host, agentd = host_account(subjects.host_id), agentd_account(subjects.host_id)
    bucket, commands = streams.bucket_stream(subjects), subjects.commands_stream
    state = streams.state_subject(subjects, f"{subjects.host_id}.>")
    consumer = f"{commands}.{subjects.consumer}"
    # From the host to the streams.
    yield Grant("service", OWNER, f"$JS.API.CONSUMER.INFO.{consumer}", (host,))
    yield Grant("service", OWNER, f"$JS.API.CONSUMER.MSG.NEXT.{consumer}", (host,), many=True)
    # Acknowledgements, 9 tokens; version 2 has domain and account first, 11 tokens or more. With
    # `>` in place of the numbers, one form of subject could name another host's consumer in the
    # other form.
    numbers = "*.*.*.*.*"
    yield Grant("service", OWNER, f"$JS.ACK.{consumer}.{numbers}", (host,))
    yield Grant("service", OWNER, f"$JS.ACK.*.*.{consumer}.{numbers}", (host,))
    yield Grant("service", OWNER, f"$JS.ACK.*.*.{consumer}.{numbers}.>", (host,))
    for kind in ("evt", "reply", "dead"):
        yield Grant("service", OWNER, f"{own}.{kind}.>", (host,))
        stream = streams.stream_of(subjects, f"{own}.{kind}.")
        to = (host, agentd) if kind == "reply" else (host,)
        yield Grant("service", OWNER, f"$JS.API.DIRECT.GET.{stream}.{own}.{kind}.>", to)
    yield Grant("service", OWNER, state, (host,))
    yield Grant("service", OWNER, f"$JS.API.DIRECT.GET.{bucket}.{state}", (host, agentd))
    for event in ("CREATED", "DELETED", "PAUSE"):
        advisory = f"$JS.EVENT.ADVISORY.CONSUMER.{event}.{consumer}"
        yield Grant("stream", OWNER, advisory, (host,))
    # From agentd to the stream and to the host.
    yield Grant("service", OWNER, f"{own}.cmd.>", (agentd,))
    yield Grant("service", host, f"{own}.ask.>", (agentd, DASHBOARD))
    yield Grant("service", host, "$SRV.>", (agentd,), many=True)
    discovery = discovery_subject(subjects)
    yield Grant("service", host, "$SRV.>", (DASHBOARD,), many=True, local=discovery)
    # From the host: a publication that reached HOSTD as a service is not seen by its importers.
    yield Grant("stream", host, f"{own}.evt.>", (agentd, DASHBOARD))
    yield Grant("stream", host, state, (agentd, DASHBOARD))
    yield Grant("stream", host, "_INBOX.>", (agentd,))  # to `reply_to`


def describe(grant: Grant) -> str:
    """For messages: what to add to the server's configuration, in its words."""
    return f"import {_import(grant)}, or {grant.owner} lacks {grant.kind} export {grant.subject}"


def users(hosts: Sequence[str], *, mirror: bool = False) -> dict[str, str]:
    """The user of each account that has one, e.g. `HOST_h1: host-h1`."""
    found = {ADMIN: "admin", DASHBOARD: "dashboard"}
    if mirror:
        found[MIRROR] = "mirror"
    for host in hosts:
        found |= {host_account(host): f"host-{host}", agentd_account(host): f"agentd-{host}"}
    return {**found, SYSTEM: "sys"}


def server_config(
    subjects: Subjects, hosts: Sequence[str], js_domain: str, *, mirror: bool = False
) -> str:
    """The `accounts {}` of nats-server's configuration.

    Each password is a variable, e.g. `$PASSWORD_HOST_h1`: define it above, or in the environment of
    the server.
    """
    all_grants = grants(subjects, hosts, js_domain, mirror=mirror)
    parts = ["accounts {", *_account(OWNER, "", all_grants)]
    for account, user in users(hosts, mirror=mirror).items():
        parts += _account(account, user, all_grants)
    return "\n".join([*parts, "}", f"system_account: {SYSTEM}", ""])


def _account(name: str, user: str, all_grants: Sequence[Grant]) -> Iterator[str]:
    exports = [_export(merged) for merged in _merged(all_grants, name)]
    imports = [_import(grant) for grant in all_grants if name in grant.to]
    yield f"  {name} {{"
    if name == OWNER:
        yield "    jetstream: enabled"
    if user:
        yield f'    users: [ {{ user: "{user}", password: $PASSWORD_{name} }} ]'
    for title, lines in (("exports", exports), ("imports", imports)):
        if lines:
            yield f"    {title}: ["
            yield from (f"      {line}" for line in lines)
            yield "    ]"
    yield "  }"


def _merged(all_grants: Sequence[Grant], owner: str) -> list[Grant]:
    """One export per subject, however many import it and under which names."""
    found: dict[tuple[str, str], Grant] = {}
    for grant in all_grants:
        if grant.owner == owner:
            key = (grant.kind, grant.subject)
            before = found.get(key)
            found[key] = replace(before, to=before.to + grant.to) if before else grant
    return list(found.values())


def _export(grant: Grant) -> str:
    more = ", response_type: stream" if grant.many else ""
    return f'{{ {grant.kind}: "{grant.subject}", accounts: [{", ".join(grant.to)}]{more} }}'


def _import(grant: Grant) -> str:
    local = f', to: "{grant.local}"' if grant.local and grant.local != grant.subject else ""
    return f'{{ {grant.kind}: {{ account: {grant.owner}, subject: "{grant.subject}" }}{local} }}'
