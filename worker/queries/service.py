"""The queries `ask.<verb>`: fast and read-only; none of them changes the host.

Maps in and out, in one of two forms (`forms.py`). Answers come from a `QuerySource`; this module
decodes, dispatches and builds error answers. Of an exception a caller sees only the message of a
`Failure`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import structlog
from msgspec import to_builtins

from handlers.errors import Failure, Invalid
from schemas import unpack
from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.protocol.ids import SCHEMA_VERSION, answer_name, request_name, schema_id
from schemas.protocol.queries import (
    AskDescribe,
    AskExplain,
    AskResult,
    AskUsage,
    ExplainAnswer,
    InstanceAnswer,
    ListAnswer,
    NetworkAnswer,
    PingAnswer,
    ResultAnswer,
    StatusAnswer,
)
from schemas.requests import PROTOCOL_MAX, PROTOCOL_MIN
from schemas.subjects import Subjects
from schemas.usage import InstanceUsage, TenantUsage
from worker.bus.connection import Connection
from worker.bus.message import Message
from worker.queries import forms
from worker.queries.forms import Wire
from worker.queries.micro import Endpoint, MicroService

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

ANSWER_BYTES = 1_000_000
Answer = Mapping[str, object]


class QuerySource(Protocol):
    """Has the answers, of the types that the schemas are made from (`ANSWERS`), and `stats`.

    Each method may raise a `Failure`.
    """

    async def ping(self) -> PingAnswer: ...

    async def status(self) -> StatusAnswer: ...

    def stats(self) -> Answer:
        """`{host_state, unfinished, lanes, instances, vmm_versions}`: numbers, no names."""
        ...

    async def list(self) -> ListAnswer: ...

    async def describe(
        self, tenant_id: str, pool_id: str | None, instance_id: str | None
    ) -> InstanceAnswer | NetworkAnswer:
        """One instance, or the tenant's network if pool and instance are None."""
        ...

    async def usage(
        self, tenant_id: str, pool_id: str | None, instance_id: str | None
    ) -> InstanceUsage | TenantUsage:
        """Of one instance, or of the tenant if pool and instance are None.

        Raises NotFound: no such instance or tenant.
        """
        ...

    async def result(self, command_id: str) -> ResultAnswer:
        """Raises NotFound: not in this journal."""
        ...

    async def explain(self, request: object) -> ExplainAnswer:
        """What a command with this request, as in an envelope, would do now; see `explain.py`."""
        ...


Body = dict[str, object]
Query = Callable[[Body], Awaitable[Answer]]


def query_service(
    connection: Connection,
    subjects: Subjects,
    source: QuerySource,
    *,
    version: str,
    inbox_prefixes: Sequence[str] = ("_INBOX.",),
) -> MicroService:
    """The micro service `hostd` of this host; the caller starts and closes it.

    Args:
        connection: `NatsBus.connection`.
        subjects: this host's names.
        source: has the answers.
        version: semantic version of hostd.
        inbox_prefixes: `[nats] inbox_prefixes`.
    """
    endpoints = [
        Endpoint(
            verb,
            subjects.ask(verb),
            partial(answer, verb, query),
            refuse=refusal,
            data=source.stats if verb == "status" else None,
            metadata={
                "request_schema": schema_id(request_name(verb)),
                "response_schema": schema_id(answer_name(verb)),
                "schema_version": SCHEMA_VERSION,
            },
        )
        for verb, query in queries_of(source).items()
    ]
    metadata = {
        "host_id": subjects.host_id,
        "cell": subjects.cell,
        "version": version,
        "protocol": f"{PROTOCOL_MIN}-{PROTOCOL_MAX}",
    }
    return MicroService(
        connection,
        name="hostd",
        instance=subjects.host_id,
        version=version,
        metadata=metadata,
        endpoints=endpoints,
        inbox_prefixes=inbox_prefixes,
    )


def queries_of(source: QuerySource) -> dict[str, Query]:
    """What answers each verb."""
    return {
        "ping": lambda _: source.ping(),
        "status": lambda _: source.status(),
        "list": lambda _: source.list(),
        "describe": partial(_describe, source),
        "usage": partial(_usage, source),
        "result": partial(_result, source),
        "explain": partial(_explain, source),
    }


async def _describe(source: QuerySource, body: Body) -> Answer:
    return await source.describe(*_named(body, AskDescribe))


async def _usage(source: QuerySource, body: Body) -> Answer:
    plain: Answer = to_builtins(await source.usage(*_named(body, AskUsage)))
    return plain


def _named(
    body: Body, question: type[AskDescribe] | type[AskUsage]
) -> tuple[str, str | None, str | None]:
    args = unpack.convert(body, question)
    if (args.pool_id is None) != (args.instance_id is None):
        raise Invalid("pool_id and instance_id: set both or neither", path="$.pool_id")
    return args.tenant_id, args.pool_id, args.instance_id


async def _result(source: QuerySource, body: Body) -> Answer:
    return await source.result(unpack.convert(body, AskResult).id)


async def _explain(source: QuerySource, body: Body) -> Answer:
    return await source.explain(unpack.convert(body, AskExplain).request)


async def answer(verb: str, query: Query, message: Message) -> tuple[bytes, str]:
    """The encoded answer to an encoded query, and the text of its error or ""."""
    asked, form = forms.forms_of(message)
    try:
        packed = forms.write(await query(forms.read(message.data, asked)), form)
    except DecodeError as error:
        return _error(form, error.code, str(error))
    except Failure as error:
        return _error(form, error.code, error.message)
    except Exception:
        log.exception("query.failed", verb=verb)
        text = f"{verb} failed: see the worker's log, event query.failed"
        return _error(form, Code.INTERNAL, text)
    if len(packed) > ANSWER_BYTES:
        text = f"the answer has {len(packed)} bytes; the limit is {ANSWER_BYTES}"
        return _error(form, Code.EXHAUSTED, text)
    return packed, ""


def refusal(message: Message, text: str) -> bytes:
    """The answer in place of one that the server does not take."""
    return _error(forms.forms_of(message).answered, Code.EXHAUSTED, text)[0]


def _error(form: Wire, code: Code, message: str) -> tuple[bytes, str]:
    error = {"code": str(code), "message": message}
    return forms.write({"error": error}, form), f"{code}: {message}"
