"""Creates the streams, the bucket and the consumers of a cell, or corrects their configuration.

Runs with an administrator's credentials (`hostd provision`), never with the worker's; may be
repeated. The configuration that the server returns is compared with the one sent: an old server
drops fields that it does not know without an error.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol

from schemas.subjects import Subjects
from worker.bus import accounts, api_reply, streams
from worker.bus.connection import Connection
from worker.bus.message import Message, NoResponder
from worker.bus.protocol import BusError, NotProvisioned

NOT_FOUND = (10014, 10059)
FIXED = frozenset(
    {"retention", "storage", "max_consumers", "deny_delete", "deny_purge", "name", "sealed"}
) | {"mirror"}
NO_STORAGE = (10023, 10047)  # insufficient resources, insufficient storage
NO_PEERS, OFFLINE = 10005, "peer offline"
JOINS_WITHIN_S = 15.0
"""A server that has just started counts as offline until the cluster's leader has heard it."""
ASK_AGAIN_S = 0.5


class Requester(Protocol):
    """The part of `Connection` that is used here."""

    async def request(self, subject: str, payload: bytes) -> Message: ...


@dataclass(frozen=True, slots=True)
class Made:
    """One object of the cell: `what`, and `how`: made, changed, remade, or found as needed.

    Of a dry run: missing, differs, or found. Of deletion markers: removed, stale, or found.
    """

    what: str
    how: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.how:8}{self.what}" + (f"  ({self.detail})" if self.detail else "")


async def provision(
    connection: Connection,
    subjects: Subjects,
    hosts: Sequence[str],
    *,
    replicas: int | None = None,
    placement: Mapping[str, Any] | None = None,
    sizes_mib: Mapping[str, int] = streams.SIZES_MIB,
    ack_wait_ns: int = streams.ACK_WAIT_NS,
    dry_run: bool = False,
) -> list[Made]:
    """Create or correct all of the cell, and a consumer for each of `hosts`.

    Idempotent. Ages and sizes that an operator changed are reset; replicas and placement are kept,
    unless others are asked for, and so are descriptions and metadata that there are.

    Args:
        connection: connected with the administrator's credentials.
        subjects: of the cell; their host is not used.
        hosts: IDs of the hosts that get a consumer.
        replicas: of the streams and the bucket; None: those that they have, 1 of a new one.
        placement: of the streams and the bucket, `{"cluster": str, "tags": [str]}`, each optional;
            None, or a part that is missing: the one that they have.
        sizes_mib: of the streams and the bucket, by kind.
        ack_wait_ns: when a command that was not acknowledged is delivered again.
        dry_run: only read and compare.

    Raises:
        NotProvisioned: an existing object cannot be changed to what is needed; the text says
            which one to remove.
        BusError: no answer; run it again.
    """
    api = _Api(connection)
    asked = _asked(replicas, placement)
    wanted = streams.stream_configs(subjects, sizes_mib=sizes_mib)
    made = [await _stream(api, config, asked, dry_run) for config in wanted]
    of_hosts = [replace(subjects, host_id=host) for host in hosts]
    return made + [await _consumer(api, one, ack_wait_ns, dry_run) for one in of_hosts]


async def provision_mirrors(
    connection: Connection,
    subjects: Subjects,
    js_domain: str,
    *,
    replicas: int | None = None,
    placement: Mapping[str, Any] | None = None,
    sizes_mib: Mapping[str, int] = streams.SIZES_MIB,
    dry_run: bool = False,
) -> list[Made]:
    """Create or correct copies of what dashboards read of a cell, on a server of theirs.

    Args:
        connection: to that server, with the rights to make streams in its own JetStream.
        subjects: of the cell; their host is not used.
        js_domain: the name under which that server reaches the JetStream of the cell.
        replicas, placement, sizes_mib, dry_run: as of `provision`.

    Raises:
        NotProvisioned, BusError: as `provision`.
    """
    api, asked = _Api(connection), _asked(replicas, placement)
    wanted = streams.mirror_configs(subjects, js_domain, sizes_mib=sizes_mib)
    return [await _stream(api, config, asked, dry_run) for config in wanted]


def _asked(replicas: int | None, placement: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of a stream that are changed only if they are asked for."""
    asked: dict[str, Any] = {}
    if replicas is not None:
        asked["num_replicas"] = replicas
    if placement is not None:
        asked["placement"] = dict(placement)
    return asked


async def _stream(
    api: "_Api", config: Mapping[str, Any], asked: Mapping[str, Any], dry_run: bool
) -> Made:
    """Create or correct a stream. Of its placement only the part that is asked for changes."""
    name = str(config["name"])
    what = f"bucket {name.removeprefix('KV_')}" if name.startswith("KV_") else f"stream {name}"
    if "mirror" in config:
        what = f"mirror of {what}"
    info = await api.info(f"STREAM.INFO.{name}")
    config = {**config, **asked}
    ignored = streams.STREAM_NEUTRAL - asked.keys()
    if info is None:
        if dry_run:
            return Made(what, "missing")
        got = await api.make(f"STREAM.CREATE.{name}", config, what)
        return Made(what, "made", _short_of(config, got, what, ignored))
    found = info["config"]
    _refuse_other_server(what, config, found)
    if "placement" in asked:
        placement: dict[str, Any] = {**(found.get("placement") or {}), **asked["placement"]}
        config = {**config, "placement": placement}
    wrong = streams.differences(config, found, ignored) + _unlabelled(found)
    if not wrong:
        return Made(what, "found")
    fixed = [text for text in wrong if text.split(":")[0] in FIXED]
    if fixed and dry_run:
        return Made(what, "differs", f"{'; '.join(wrong)}; cannot be changed: remove it first")
    if fixed:
        raise NotProvisioned(
            f"{what} exists with {'; '.join(fixed)}, which cannot be changed: remove it first"
        )
    if dry_run:
        return Made(what, "differs", "; ".join(wrong))
    kept = _kept(config, found, ignored)
    try:
        got = await api.make(f"STREAM.UPDATE.{name}", {**config, **kept}, what)
    except NotProvisioned as error:
        raise NotProvisioned(
            f"{error}: cannot change {'; '.join(wrong)}: remove the stream first"
        ) from error
    return Made(what, "changed", "; ".join(wrong) + _short_of(config, got, what, ignored))


def _refuse_other_server(what: str, config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """A cell and its mirrors have streams of the same names; neither is to be removed for the
    other."""
    if "mirror" in config and not found.get("mirror"):
        raise NotProvisioned(
            f"cannot make {what}: this server has the stream itself, as one of the cell: "
            "connect to the server that keeps the copies"
        )
    if "mirror" not in config and found.get("mirror"):
        raise NotProvisioned(
            f"cannot make {what}: this server has a mirror of it: connect to a server of the cell"
        )


async def _consumer(api: "_Api", subjects: Subjects, ack_wait_ns: int, dry_run: bool) -> Made:
    """Create or repair the consumer; one that cannot be changed is deleted and created again.

    Nothing is lost by that: the stream keeps what was not acknowledged.
    """
    stream, name = subjects.commands_stream, subjects.consumer
    what = f"consumer {name} of {stream}"
    config = streams.consumer_config(subjects, ack_wait_ns=ack_wait_ns)
    create = f"CONSUMER.DURABLE.CREATE.{stream}.{name}"
    info = await api.info(f"CONSUMER.INFO.{stream}.{name}")
    if info is None:
        if dry_run:
            return Made(what, "missing")
        got = await api.make(create, {"stream_name": stream, "config": config}, what)
        return Made(what, "made", _short_of(config, got, what, streams.NEUTRAL))
    found = streams.consumer_found(info)
    wrong = streams.differences(config, found, streams.NEUTRAL) + _unlabelled(found)
    if not wrong:
        return Made(what, "found")
    if dry_run:
        return Made(what, "differs", "; ".join(wrong))
    kept = _kept(config, found, streams.NEUTRAL)
    body = {"stream_name": stream, "config": {**config, **kept}}
    how = "changed"
    try:
        await api.make(create, body, what)
        left = await _left_of_consumer(api, stream, name, config)
    except NotProvisioned:
        left = wrong
    if left:
        how = "remade"
        await api.remove(f"CONSUMER.DELETE.{stream}.{name}", what)
        await api.make(create, body, what)
        left = await _left_of_consumer(api, stream, name, config)
    if left:
        raise NotProvisioned(f"{what}: the server did not store {'; '.join(left)}: upgrade it")
    return Made(what, how, "; ".join(wrong))


def _kept(config: Mapping[str, Any], found: Mapping[str, Any], ignored: Set[str]) -> dict[str, Any]:
    """What a change leaves as it is. The server's and an administrator's metadata stay beside
    hostd's own; of the description only one that says something."""
    kept = {field: value for field, value in found.items() if field in ignored}
    kept["metadata"] = {**(found.get("metadata") or {}), **config["metadata"]}
    if not found.get("description"):
        kept.pop("description", None)
    return kept


def _unlabelled(found: Mapping[str, Any]) -> list[str]:
    """An administrator's own description stays; metadata come with it, and a server before 2.10
    drops them."""
    return [] if found.get("description") else ["description: is missing"]


async def _left_of_consumer(
    api: "_Api", stream: str, name: str, config: Mapping[str, Any]
) -> list[str]:
    """What is still wrong after a change."""
    info = await api.info(f"CONSUMER.INFO.{stream}.{name}")
    found = streams.consumer_found(info) if info is not None else {}
    return streams.differences(config, found, streams.NEUTRAL)


def _short_of(
    config: Mapping[str, Any], got: Mapping[str, Any], what: str, ignored: Set[str]
) -> str:
    """What the server did not store, as a text; raises if the worker cannot work without it."""
    got = streams.consumer_found({"config": got}) if "durable_name" in got else got
    short = streams.differences(config, got, ignored)
    tunable = streams.STREAM_TUNABLE | streams.CONSUMER_TUNABLE
    fatal = [text for text in short if text.split(":")[0] not in tunable]
    if fatal:
        raise NotProvisioned(f"{what}: the server did not store {'; '.join(fatal)}: upgrade it")
    return f"not supported by this server: {'; '.join(short)}" if short else ""


class _Api:
    def __init__(self, connection: Requester) -> None:
        self._connection = connection

    async def info(self, endpoint: str) -> dict[str, Any] | None:
        answer = await self._call(endpoint, None)
        if "error" in answer:
            if answer["error"].get("err_code") in NOT_FOUND:
                return None
            raise BusError(f"{endpoint}: {answer['error'].get('description')}")
        return answer

    async def remove(self, endpoint: str, what: str) -> None:
        answer = await self._call(endpoint, None)
        if "error" in answer:
            raise NotProvisioned(f"cannot remove {what}: {answer['error'].get('description')}")

    async def make(self, endpoint: str, body: Mapping[str, Any], what: str) -> dict[str, Any]:
        answer = await self._call(endpoint, body)
        last = asyncio.get_running_loop().time() + JOINS_WITHIN_S
        while _waits_for_peer(answer) and asyncio.get_running_loop().time() < last:
            await asyncio.sleep(ASK_AGAIN_S)
            answer = await self._call(endpoint, body)
        if "error" in answer:
            why = str(answer["error"].get("description"))
            if answer["error"].get("err_code") in NO_STORAGE:
                size = int(body.get("max_bytes", 0)) >> 20
                why += f": it reserves {size} MiB; raise max_file_store, or choose --size"
            raise NotProvisioned(f"{what}: {why}")
        return api_reply.member(answer, "config", what)

    async def _call(self, endpoint: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        payload = b"" if body is None else json.dumps(body).encode()
        try:
            answer = await self._connection.request(f"$JS.API.{endpoint}", payload)
        except NoResponder as error:
            raise NotProvisioned(
                f"nothing answers $JS.API.{endpoint}: enable JetStream for this NATS account, or"
                f" use {accounts.ADMIN} of `hostd provision --server-config`, the account that"
                f" imports $JS.API.> of {accounts.OWNER}"
            ) from error
        return api_reply.read_reply(answer.data, f"reply to $JS.API.{endpoint}")


def _waits_for_peer(answer: Mapping[str, Any]) -> bool:
    """Whether a server of the cluster is missing, and not e.g. one with the tags asked for."""
    error: Mapping[str, Any] = answer.get("error", {})
    return error.get("err_code") == NO_PEERS and OFFLINE in str(error.get("description"))
