"""The questions `ask.<verb>`: fast, read-only, never a way to change the host.

Msgpack maps in and out; an empty body is the empty map. What is asked for comes from a `Source`;
this module decodes, dispatches and shapes errors, and lets nothing of an exception out but the
message of a `Failure`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import msgspec
import structlog

from handlers.errors import Failure, Invalid
from schemas import unpack
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.requests import PROTOCOL_MAX, PROTOCOL_MIN
from schemas.subjects import Subjects
from worker.bus.connection import Link
from worker.queries.micro import Endpoint, MicroService

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

ANSWER_BYTES = 1_000_000
Answer = Mapping[str, object]


class Source(Protocol):
    """Who knows the answers. Each returns a map of plain values; each may raise a `Failure`."""

    async def ping(self) -> Answer:
        """`{v, host_id, host_state, uptime_s}`."""
        ...

    async def status(self) -> Answer:
        """`{v, host_id, host_state, boot_id, journal_id, unfinished, lanes, instances}`."""
        ...

    async def list(self) -> Answer:
        """`{v, instances: [...], networks: [...]}`."""
        ...

    async def describe(
        self, tenant_id: str, pool_id: str | None, instance_id: str | None
    ) -> Answer:
        """Of one instance, or of a tenant's network if pool and instance are None."""
        ...

    async def result(self, command_id: str) -> Answer:
        """`{v, id, state: waiting|running|done, reply?}`. Raises NotFound: not journalled here."""
        ...


class _Describe(msgspec.Struct, frozen=True):
    tenant_id: str
    pool_id: str | None = None
    instance_id: str | None = None


class _Result(msgspec.Struct, frozen=True):
    id: str


Body = dict[str, object]


def ask_service(
    link: Link,
    subjects: Subjects,
    source: Source,
    *,
    version: str,
    inbox_prefixes: Sequence[str] = ("_INBOX.",),
) -> MicroService:
    """The micro service `hostd` of this host; `start` and `close` it.

    Args:
        link: `NatsBus.link`.
        subjects: this host's names.
        source: who knows the answers.
        version: of hostd, semantic.
        inbox_prefixes: `[nats] inbox_prefixes`.
    """
    questions: dict[str, Callable[[Body], Awaitable[Answer]]] = {
        "ping": lambda _: source.ping(),
        "status": lambda _: source.status(),
        "list": lambda _: source.list(),
        "describe": partial(_describe, source),
        "result": partial(_result, source),
    }
    endpoints = [
        Endpoint(verb, subjects.ask(verb), partial(answer, verb, question))
        for verb, question in questions.items()
    ]
    metadata = {
        "host_id": subjects.host_id,
        "cell": subjects.cell,
        "version": version,
        "protocol": f"{PROTOCOL_MIN}-{PROTOCOL_MAX}",
    }
    return MicroService(
        link,
        name="hostd",
        instance=subjects.host_id,
        version=version,
        metadata=metadata,
        endpoints=endpoints,
        inbox_prefixes=inbox_prefixes,
    )


async def _describe(source: Source, body: Body) -> Answer:
    wanted = unpack.convert(body, _Describe)
    if (wanted.pool_id is None) != (wanted.instance_id is None):
        raise Invalid("pool_id and instance_id come together", path="$.pool_id")
    return await source.describe(wanted.tenant_id, wanted.pool_id, wanted.instance_id)


async def _result(source: Source, body: Body) -> Answer:
    return await source.result(unpack.convert(body, _Result).id)


async def answer(
    verb: str, question: Callable[[Body], Awaitable[Answer]], data: bytes
) -> tuple[bytes, bool]:
    """The bytes that answer a question's bytes, and whether they are an error."""
    try:
        body = unpack.unpack_map(data) if data else {}
        packed = unpack.pack(dict(await question(body)))
    except DecodeError as error:
        return _error(error.code, str(error)), True
    except Failure as error:
        return _error(error.code, error.message), True
    except Exception:
        log.exception("query.failed", verb=verb)
        return _error(Code.INTERNAL, f"{verb} failed; the worker's log says why"), True
    if len(packed) > ANSWER_BYTES:
        text = f"the answer has {len(packed)} bytes, more than {ANSWER_BYTES}"
        return _error(Code.EXHAUSTED, text), True
    return packed, False


def _error(code: Code, message: str) -> bytes:
    return unpack.pack({"error": {"code": str(code), "message": message}})
