"""Make the streams, the bucket and the consumers of a cell, or bring them to what hostd needs.

Run by an administrator's credential (`hostd provision`), never by the worker's; may be repeated.
What the server gives back is compared with what was asked for: an old server drops what it does
not know without an error.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from schemas.subjects import Subjects
from worker.bus import streams
from worker.bus.connection import Link
from worker.bus.message import Message, NoResponder
from worker.bus.protocol import BusError, NotProvisioned

NOT_FOUND = (10014, 10059)
FIXED = ("retention", "storage", "max_consumers", "deny_delete", "name")


class Requester(Protocol):
    """All that is needed of a connection; `Link` is one."""

    async def request(self, subject: str, payload: bytes) -> Message: ...


@dataclass(frozen=True, slots=True)
class Made:
    """One object of the cell: `what`, and `how` it came: made, changed, found."""

    what: str
    how: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.how:8}{self.what}" + (f"  ({self.detail})" if self.detail else "")


async def provision(
    link: Link,
    subjects: Subjects,
    hosts: Sequence[str],
    *,
    replicas: int = 1,
    ack_wait_ns: int = streams.ACK_WAIT_NS,
) -> list[Made]:
    """Make or correct everything of the cell, and a consumer for each of `hosts`.

    Idempotent. Ages and sizes that an operator changed are brought back to hostd's own.

    Args:
        link: connected with the administrator's credential.
        subjects: of the cell; its host is not used.
        hosts: ids of the hosts that get a consumer.
        replicas: of the streams.
        ack_wait_ns: how soon a command comes again that was delivered and not acknowledged.

    Raises:
        NotProvisioned: something is there that can not be changed into what is needed; the text
            says what to remove.
        BusError: no answer; run it again.
    """
    api = _Api(link)
    wanted = streams.stream_configs(subjects, replicas=replicas)
    made = [await _stream(api, config) for config in wanted]
    made += [await _consumer(api, replace(subjects, host_id=host), ack_wait_ns) for host in hosts]
    return made


async def _stream(api: "_Api", config: Mapping[str, Any]) -> Made:
    name = str(config["name"])
    what = f"stream {name}"
    found = await api.config(f"STREAM.INFO.{name}")
    if found is None:
        got = await api.make(f"STREAM.CREATE.{name}", config, what)
        return Made(what, "made", _short_of(config, got, what))
    wrong = streams.differences(config, found)
    if not wrong:
        return Made(what, "found")
    fixed = [text for text in wrong if text.split(":")[0] in FIXED]
    if fixed:
        raise NotProvisioned(
            f"{what} is there with {'; '.join(fixed)}, which can not be changed: remove it first"
        )
    got = await api.make(f"STREAM.UPDATE.{name}", {**found, **config}, what)
    return Made(what, "changed", "; ".join(wrong) + _short_of(config, got, what))


async def _consumer(api: "_Api", subjects: Subjects, ack_wait_ns: int) -> Made:
    stream, name = subjects.commands_stream, subjects.consumer
    what = f"consumer {name} of {stream}"
    config = streams.consumer_config(subjects, ack_wait_ns=ack_wait_ns)
    found = await api.config(f"CONSUMER.INFO.{stream}.{name}")
    wrong = streams.differences(config, found) if found is not None else []
    if found is not None and not wrong:
        return Made(what, "found")
    body = {"stream_name": stream, "config": {**(found or {}), **config}}
    got = await api.make(f"CONSUMER.DURABLE.CREATE.{stream}.{name}", body, what)
    how = "made" if found is None else "changed"
    return Made(what, how, "; ".join(wrong) + _short_of(config, got, what))


def _short_of(config: Mapping[str, Any], got: Mapping[str, Any], what: str) -> str:
    """What the server did not take over, as a text; fatal if the worker can not do without it."""
    short = streams.differences(config, got)
    needed = {
        *streams.needed_of_stream(config),
        *streams.needed_of_consumer(config),
    }
    fatal = [text for text in short if text.split(":")[0] in needed]
    if fatal:
        raise NotProvisioned(f"{what}: the server does not keep {'; '.join(fatal)}: it is too old")
    return f"not kept by this server: {'; '.join(short)}" if short else ""


class _Api:
    def __init__(self, link: Requester) -> None:
        self._link = link

    async def config(self, endpoint: str) -> dict[str, Any] | None:
        answer = await self._call(endpoint, None)
        if "error" in answer:
            if answer["error"].get("err_code") in NOT_FOUND:
                return None
            raise BusError(f"{endpoint}: {answer['error'].get('description')}")
        found: dict[str, Any] = answer["config"]
        return found

    async def make(self, endpoint: str, body: Mapping[str, Any], what: str) -> dict[str, Any]:
        answer = await self._call(endpoint, body)
        if "error" in answer:
            raise NotProvisioned(f"{what}: {answer['error'].get('description')}")
        got: dict[str, Any] = answer["config"]
        return got

    async def _call(self, endpoint: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        payload = b"" if body is None else json.dumps(body).encode()
        try:
            answer = await self._link.request(f"$JS.API.{endpoint}", payload)
        except NoResponder as error:
            raise NotProvisioned("this account of the NATS server has no JetStream") from error
        found: dict[str, Any] = json.loads(answer.data)
        return found
