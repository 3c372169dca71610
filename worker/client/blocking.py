"""`BlockingClient`: the client for programs without an event loop, e.g. a script or a cron job.

    with BlockingClient.connect("nats://127.0.0.1:4222", cell="default") as client:
        reply = client.send("h1", Ping(), timeout_s=10)

Each method blocks and is that of `HostdClient`, which runs in a thread of its own until the `with`
block ends. May be used from several threads at once; not from within an event loop.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import Any, TypeVar

from schemas.envelopes import Event, Reply
from schemas.requests import Request
from schemas.subjects import Lane
from worker.client.client import (
    CONNECT_TIMEOUT_S,
    DeadLetter,
    HostdClient,
    StateValue,
    StoredEvent,
)
from worker.client.errors import NoConnection
from worker.client.feed import CAPACITY, EventFeed
from worker.client.link import ASK_TIMEOUT_S
from worker.client.queries import Listing, Query

__all__ = ["BlockingClient", "BlockingFeed"]

A = TypeVar("A")


class _Loop:
    """An event loop in another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open = True
        self._lock = threading.Lock()  # what is begun before `close` is cancelled with the loop

    def close(self) -> None:
        """Begin nothing more."""
        with self._lock:
            self._open = False

    def run(self, work: Coroutine[Any, Any, A]) -> A:
        """The result; an exception here, e.g. Ctrl-C, cancels the work.

        Raises:
            NoConnection: the client is closed, or was closed meanwhile.
        """
        with self._lock:
            if not self._open:
                work.close()
                raise NoConnection("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise NoConnection("the client was closed during the call") from error
        finally:
            future.cancel()

    @contextmanager
    def entered(self, opened: AbstractAsyncContextManager[A]) -> Generator[A]:
        """An asynchronous context manager as one that is not."""
        value = self.run(_enter(opened))
        try:
            yield value
        finally:
            with suppress(NoConnection):  # closed: it was left with the loop
                self.run(_leave(opened))

    def each(self, values: AsyncGenerator[A]) -> Generator[A]:
        """An asynchronous generator as one that is not."""
        try:
            while True:
                try:
                    value = self.run(_next(values))
                except StopAsyncIteration:
                    return
                yield value
        finally:
            with suppress(NoConnection):
                self.run(_close(values))


class BlockingFeed:
    """An iterator of `Event`; see `worker.client.feed.EventFeed`."""

    def __init__(self, loop: _Loop, feed: EventFeed) -> None:
        self._loop = loop
        self._feed = feed

    def after(self, host: str, listing: Listing) -> None:
        """Leave out what the list reflects, which was asked for after the feed began."""
        self._feed.after(host, listing)

    def take(self, timeout_s: float | None = None) -> Event:
        """The next event. Raises `TimeoutError`, after which the feed goes on, or `EventsLost`."""
        return self._loop.run(_take(self._feed, timeout_s))

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return self.take()


class BlockingClient:
    """Opened by `connect`. Raises what `HostdClient` raises.

    A call that another thread makes when the `with` block ends, or afterwards, is `NoConnection`.
    """

    def __init__(self, loop: _Loop, client: HostdClient) -> None:
        self._loop = loop
        self._client = client

    @classmethod
    @contextmanager
    def connect(
        cls,
        url: str = "nats://127.0.0.1:4222",
        *,
        cell: str = "default",
        root: str = "",
        creds: str = "",
        ca_file: str = "",
        js_domain: str = "",
        inbox_prefix: str = "_INBOX",
        name: str = "hostd-client",
        timeout_s: float = CONNECT_TIMEOUT_S,
        patient: bool = True,
    ) -> Generator["BlockingClient"]:
        """See `HostdClient.connect`."""
        with _thread() as loop:
            opened = HostdClient.connect(
                url,
                cell=cell,
                root=root,
                creds=creds,
                ca_file=ca_file,
                js_domain=js_domain,
                inbox_prefix=inbox_prefix,
                name=name,
                timeout_s=timeout_s,
                patient=patient,
            )
            with loop.entered(opened) as client:
                yield cls(loop, client)

    def send(
        self,
        host: str,
        request: Request,
        *,
        timeout_s: float,
        command_id: str | None = None,
        deadline_ms: int | None = None,
        issuer: str | None = None,
        traceparent: str | None = None,
    ) -> Reply:
        """See `HostdClient.send`."""
        work = self._client.send(
            host,
            request,
            timeout_s=timeout_s,
            command_id=command_id,
            deadline_ms=deadline_ms,
            issuer=issuer,
            traceparent=traceparent,
        )
        return self._loop.run(work)

    def kept_reply(self, host: str, request: Request, command_id: str) -> Reply | None:
        """See `HostdClient.kept_reply`."""
        return self._loop.run(self._client.kept_reply(host, request, command_id))

    def ask(self, host: str, query: Query[A], *, timeout_s: float = ASK_TIMEOUT_S) -> A:
        """See `HostdClient.ask`."""
        return self._loop.run(self._client.ask(host, query, timeout_s=timeout_s))

    @contextmanager
    def events(self, host: str, *, capacity: int = CAPACITY) -> Generator[BlockingFeed]:
        """See `HostdClient.events`."""
        with self._loop.entered(self._client.events(host, capacity=capacity)) as feed:
            yield BlockingFeed(self._loop, feed)

    def stored_events(
        self, host: str = "*", *, after: int = 0, follow: bool = True
    ) -> Generator[StoredEvent]:
        """See `HostdClient.stored_events`."""
        return self._loop.each(self._client.stored_events(host, after=after, follow=follow))

    def state(self, host: str, lane: Lane) -> StateValue | None:
        """See `HostdClient.state`."""
        return self._loop.run(self._client.state(host, lane))

    def dead_letters(self, host: str) -> Generator[DeadLetter]:
        """See `HostdClient.dead_letters`."""
        return self._loop.each(self._client.dead_letters(host))


@contextmanager
def _thread() -> Generator[_Loop]:
    """A loop that runs until the block ends; what runs on it then is cancelled.

    Raises:
        NoConnection: this process can have no more threads or open files.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()

    def work() -> None:
        serving = serve()
        try:
            asyncio.run(serving)
        except BaseException as error:
            serving.close()
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=work, name="hostd-client")
    try:
        thread.start()
        loop, stop = started.result()
    except (OSError, RuntimeError) as error:
        raise NoConnection(f"cannot run an event loop in a thread: {error}") from error
    served = _Loop(loop)
    try:
        yield served
    finally:
        served.close()
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _enter(opened: AbstractAsyncContextManager[A]) -> A:
    return await opened.__aenter__()


async def _leave(opened: AbstractAsyncContextManager[Any]) -> None:
    await opened.__aexit__(None, None, None)


async def _next(values: AsyncGenerator[A]) -> A:
    return await anext(values)


async def _close(values: AsyncGenerator[Any]) -> None:
    await values.aclose()


async def _take(feed: EventFeed, timeout_s: float | None) -> Event:
    async with asyncio.timeout(timeout_s):
        return await anext(feed)
