"""A NATS micro service (NATS ADR-32) on the worker's connection: discovery, statistics, endpoints.

nats-py's own serves each endpoint one request at a time, sends `repr` of an exception to the
caller, answers to any subject that a request names, and loses requests when it stops. Discovery
works with every `nats micro` tool; the content of an answer is the endpoint's.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

import msgspec
import structlog

from schemas.decode_error import DecodeError
from schemas.subjects import check_reply_to
from worker.bus.connection import Connection
from worker.bus.message import Message, Subscription
from worker.bus.protocol import BusError, Unsendable
from worker.queries.fair_queue import FairQueue

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

TYPE = "io.nats.micro.v1"
# Reply subjects of requests from other accounts, made and routed by the server to the requester of
# that request only. A client of the same account would have to guess 14 random characters of one.
CROSS_ACCOUNT = "_R_."
REQUESTER = "Nats-Request-Info"
"""The server's header of such a request, whatever its sender put there; the account is `acc`."""
ACCOUNT_MAX = 256  # characters; that of an account with a JWT has 56


@dataclass(slots=True)
class Endpoint:
    """One query. `handle` answers any message with bytes, and the text of an error or "".

    `refuse` makes the answer of an error that prevents the real one, from its message. `data` is
    shown by `$SRV.STATS`, `metadata` by `$SRV.INFO`.
    """

    name: str
    subject: str
    handle: Callable[[Message], Awaitable[tuple[bytes, str]]]
    refuse: Callable[[Message, str], bytes]
    data: Callable[[], Mapping[str, object]] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    requests: int = field(default=0, init=False)
    errors: int = field(default=0, init=False)
    last_error: str = field(default="", init=False)
    took_ns: int = field(default=0, init=False)

    def failed(self, error: str) -> None:
        """Count an error answer."""
        self.errors += 1
        self.last_error = error


class _Requester(msgspec.Struct):
    account: Annotated[str, msgspec.Meta(max_length=ACCOUNT_MAX)] = msgspec.field(name="acc")


def asker_of(message: Message) -> str:
    """Whose share a question takes: an account's, if it is another one, or else an inbox's.

    An inbox is without its last token, which client libraries change at each request. The reply
    subjects of other accounts have nothing of the asker in them.
    """
    if message.reply.startswith(CROSS_ACCOUNT):
        try:
            requester = msgspec.json.decode(message.headers[REQUESTER], type=_Requester)
        except (KeyError, ValueError, RecursionError):
            pass  # a server that does not say: all of them are one asker
        else:
            return f"account {requester.account}"
    return message.reply.rpartition(".")[0]


class MicroService:
    """Serves until closed; subscribes again on each new connection.

    Args:
        connection: the connection.
        name: of the service, the same on every host.
        instance: ID of this one, also its queue group.
        version: semantic.
        metadata: shown by discovery.
        endpoints: all of them.
        inbox_prefixes: of the reply subjects that are allowed; any other request is dropped.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        name: str,
        instance: str,
        version: str,
        metadata: Mapping[str, str],
        endpoints: Sequence[Endpoint],
        inbox_prefixes: Sequence[str],
    ) -> None:
        self._connection = connection
        self._identity: dict[str, Any] = {
            "name": name,
            "id": instance,
            "version": version,
            "metadata": dict(metadata),
        }
        self._endpoints = endpoints
        self._prefixes = (*inbox_prefixes, CROSS_ACCOUNT)
        self._started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        self._queue = FairQueue()
        self._subscriptions: list[Subscription] = []
        self._fresh = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._invalid = 0

    @property
    def dropped(self) -> int:
        """Requests without an allowed reply subject, and those beyond their asker's share."""
        return self._invalid + self._queue.dropped

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self._queue.running

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._queue.waiting

    async def start(self) -> None:
        """Start serving; returns at once, with or without a connection."""
        self._connection.on_up(lambda fresh: self._fresh.set() if fresh else None)
        if self._connection.connected:
            self._fresh.set()
        self._keeper = asyncio.create_task(self._keep(), name="micro")

    async def close(self) -> None:
        """Unsubscribe, then answer the requests already received."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for subscription in self._subscriptions:
            try:
                await subscription.unsubscribe()
            except Exception as error:  # noqa: BLE001 (of a client that is gone)
                log.debug("query.unsubscribe_failed", error=str(error))
        self._subscriptions = []
        await self._queue.close()

    async def _keep(self) -> None:
        """nats-py repeats subscriptions after a reconnect, but not in a new client."""
        while True:
            await self._fresh.wait()
            self._fresh.clear()
            try:
                await self._subscribe()
            except BusError as error:
                log.warning("query.subscribe_failed", error=str(error))

    async def _subscribe(self) -> None:
        self._subscriptions = []
        name, instance = self._identity["name"], self._identity["id"]
        for verb, describe in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            receive = partial(self._take, partial(self._discover, describe))
            for suffix in ("", f".{name}", f".{name}.{instance}"):
                subject = f"$SRV.{verb}{suffix}"
                self._subscriptions.append(await self._connection.subscribe(subject, receive))
        for endpoint in self._endpoints:
            receive = partial(self._take, partial(self._serve, endpoint))
            self._subscriptions.append(
                await self._connection.subscribe(endpoint.subject, receive, queue=instance)
            )

    # -- one request -------------------------------------------------------------------------------

    def _take(self, work: Callable[[Message], Awaitable[None]], message: Message) -> None:
        """Answer in a separate task, so that a slow query does not delay the others."""
        try:
            # hostd publishes to this subject with its own permissions, not with the caller's.
            check_reply_to(message.reply, self._prefixes)
        except DecodeError:
            self._invalid += 1
            return
        self._queue.put(asker_of(message), partial(self._run, work, message))

    async def _run(self, work: Callable[[Message], Awaitable[None]], message: Message) -> None:
        try:
            await work(message)
        except BusError as error:
            log.debug("query.answer_lost", subject=message.subject, error=str(error))
        except Exception:
            log.exception("query.crashed", subject=message.subject)

    async def _serve(self, endpoint: Endpoint, message: Message) -> None:
        began_ns = time.perf_counter_ns()
        endpoint.requests += 1
        answer, failure = await endpoint.handle(message)
        if failure:
            endpoint.failed(failure)
        endpoint.took_ns += time.perf_counter_ns() - began_ns
        try:
            await self._connection.send(message.reply, answer)
        except Unsendable as error:
            if not failure:
                endpoint.failed(str(error))
            await self._connection.send(message.reply, endpoint.refuse(message, str(error)))

    async def _discover(self, describe: Callable[[], dict[str, Any]], message: Message) -> None:
        await self._connection.send(message.reply, json.dumps(describe()).encode())

    # -- discovery ---------------------------------------------------------------------------------

    def _ping(self) -> dict[str, Any]:
        return {"type": f"{TYPE}.ping_response", **self._identity}

    def _info(self) -> dict[str, Any]:
        queue = self._identity["id"]
        return {
            "type": f"{TYPE}.info_response",
            **self._identity,
            "description": "One host of a Firecracker fleet",
            "endpoints": [
                {
                    "name": e.name,
                    "subject": e.subject,
                    "queue_group": queue,
                    "metadata": dict(e.metadata),
                }
                for e in self._endpoints
            ],
        }

    def _stats(self) -> dict[str, Any]:
        queue = self._identity["id"]
        return {
            "type": f"{TYPE}.stats_response",
            **self._identity,
            "started": self._started,
            "endpoints": [
                {
                    "name": e.name,
                    "subject": e.subject,
                    "queue_group": queue,
                    "num_requests": e.requests,
                    "num_errors": e.errors,
                    "last_error": e.last_error,
                    "processing_time": e.took_ns,
                    "average_processing_time": e.took_ns // max(1, e.requests),
                    "data": e.data() if e.data is not None else None,
                }
                for e in self._endpoints
            ],
        }
