"""The worker's connection to NATS: connects, and reconnects for as long as the worker runs.

Starts without a server; survives restarts, stalls, rejected and rotated credentials, and a client
object that failed. Its users (`pull_consumer.py`, `nats.py`, `worker/queries`) get typed messages
and `BusError`, and are notified of each new connection. Knows no streams and no subjects.
"""

# pyright: reportUnknownMemberType=false

import asyncio
import contextlib
import hashlib
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from nats import errors
from nats.aio.client import Client

from schemas.settings import NatsSettings, without_password
from worker.bus.credentials import CredentialsFile
from worker.bus.guarded_client import (
    ALL_GUARDS,
    STANDARD,
    Backoff,
    Guard,
    GuardedClient,
    Tuning,
    check_library,
)
from worker.bus.lean_client import encode_headers
from worker.bus.message import Message, NoResponder, Subscription
from worker.bus.nats_call import NatsCall, error_text
from worker.bus.protocol import BusError, Unsendable
from worker.bus.strict_client import requires_tls

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# After a connection that lasted this long, the backoff starts from its base again.
STEADY_S = 5.0
FAILURES_KEPT = 32
DENIALS_KEPT = 100
NO_RESPONDERS = "503"
KEEPER = "nats-connection"  # the name of the task that connects


class Connection:
    """One logical connection to NATS, over any number of sockets and clients.

    Args:
        settings: `[nats]`.
        name: shown in the server's connection list.
        inbox: prefix of this process's own inboxes, without the final dot.
        guards: those in effect; tests leave one out.
        logger: gets what happens to the connection.

    Needs: nothing at start; `start` returns at once with or without a server.
    """

    def __init__(
        self,
        settings: NatsSettings,
        *,
        name: str,
        inbox: str,
        guards: frozenset[Guard] = ALL_GUARDS,
        tuning: Tuning = STANDARD,
        logger: structlog.typing.FilteringBoundLogger = log,
    ) -> None:
        check_library()
        self._log = logger
        self.tuning = tuning
        self.guards = guards
        self._cancellable = Guard.CANCEL in guards
        self._name, self._inbox = name, inbox
        self._use(settings)
        self._client: GuardedClient | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[bool], None]] = []
        self._loss_listeners: list[Callable[[], None]] = []
        self._up = asyncio.Event()
        self._dead = asyncio.Event()
        self._news = asyncio.Event()  # it came up, or an attempt to connect failed
        self._backoff = Backoff(
            tuning.backoff_base_s, tuning.backoff_cap_s, jitter=Guard.JITTER in guards
        )
        self._up_at = 0.0
        self._logged = ""
        self._denials: dict[str, float] = {}  # what the server denied, and when last
        self.reconnects = 0
        self.permission_errors = 0
        self.last_error = ""
        self.failures: list[str] = []  # of the first attempts to connect

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect and stay connected, in the background, until `close`."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep_connected(), name=KEEPER)

    def _use(self, settings: NatsSettings) -> None:
        self._settings = settings
        self._url = without_password(settings.url)
        self._servers = [url.strip() for url in settings.url.split(",")]
        self._tls = requires_tls(self._servers, settings.tls)
        self._creds = (
            CredentialsFile(settings.creds, reread=Guard.REREAD_CREDS in self.guards)
            if settings.creds
            else None
        )
        self._in_use: tuple[object, ...] = ()

    async def reload(self, settings: NatsSettings) -> bool:
        """Use other servers, credentials or a CA file; reconnect if any of them changed.

        Returns whether it reconnects. Requests that wait for an answer fail and are repeated by
        their callers.

        Raises:
            BusError: one of the files cannot be used; the connection stays as it is.
        """
        try:
            if settings.creds:
                CredentialsFile(settings.creds).check()
            if settings.tls:
                await asyncio.to_thread(ssl.create_default_context, cafile=settings.tls)
            if _contents(settings) == self._in_use:
                return False
        except (OSError, errors.Error) as error:
            raise BusError(f"cannot reload [nats]: {error_text(error)}") from error
        await (
            self.close()
        )  # also an attempt to connect with the old settings, which goes on forever
        self._use(settings)
        await self.start()
        return True

    async def close(self) -> None:
        """Send what is buffered, for up to two seconds, and disconnect."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        self._up.clear()

    async def _keep_connected(self) -> None:
        while True:
            self._dead.clear()
            client = GuardedClient(self.guards, self._backoff, self._on_dead, tls=self._tls)
            try:
                await self._connect(client)
                if client.is_connected:
                    await client.listen_for_answers()
                    self._client = client
                    self._came_up(fresh=True)
                    await self._dead.wait()
            except Exception as error:  # noqa: BLE001 - reported; whatever nats-py or nkeys raise
                await self._on_error(error)
            finally:
                await self._discard(client)
            if Guard.REBUILD not in self.guards:
                return
            await asyncio.sleep(self._backoff.next_s())

    async def _connect(self, client: GuardedClient) -> None:
        with contextlib.suppress(OSError):  # the attempt itself reports a file that is missing
            self._in_use = _contents(self._settings)
        options: dict[str, Any] = {"connect_timeout": self.tuning.connect_timeout_s}
        if Guard.PING in self.guards:  # the default finds a stalled connection after six minutes
            options["ping_interval"] = self.tuning.ping_s
            options["max_outstanding_pings"] = self.tuning.pings
        if self._creds is not None and self._creds.is_jwt():
            options["user_credentials"] = self._creds.path
        elif self._creds is not None:
            options["user"] = self._creds.user
            options["password"] = self._creds.password
        if self._settings.tls:
            options["tls"] = ssl.create_default_context(cafile=self._settings.tls)
        await client.connect(
            self._servers,
            name=self._name,
            inbox_prefix=self._inbox,
            error_cb=self._safe(self._on_error),
            disconnected_cb=self._safe(self._on_lost),
            reconnected_cb=self._safe(self._on_reconnected),
            closed_cb=self._safe(self._on_closed),
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            pending_size=self.tuning.pending_bytes,
            flush_timeout=2,
            **options,
        )

    async def _discard(self, client: GuardedClient) -> None:
        """Close a client in any state; a stalled peer delays this by two seconds."""
        was_up = self._client is client
        if was_up:
            self._client = None
        self._up.clear()
        try:
            async with asyncio.timeout(2):
                await client.close()
        except (TimeoutError, OSError, errors.Error):
            client.abort()
            with contextlib.suppress(OSError, errors.Error, asyncio.TimeoutError):
                async with asyncio.timeout(2):
                    await client.close()
        except Exception:
            # Whatever state it is in: nobody would connect again if the supervisor ended here.
            if Guard.DISCARD not in self.guards:
                raise
            self._log.exception("bus.discard_failed")
            client.abort()
        finally:
            await client.end_tasks()
            if not was_up:
                await client.drop()  # nats-py's close leaves the socket of a failed attempt open

    # -- what nats-py calls ------------------------------------------------------------------------

    def _safe(self, callback: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        """An exception in a callback ends nats-py's reader or its reconnecting."""
        if Guard.SAFE_CALLBACKS not in self.guards:
            return callback

        async def guarded(*arguments: Any) -> None:
            try:
                await callback(*arguments)
            except Exception:  # noqa: BLE001 - it is logged
                self._log.exception("bus.callback_failed", callback=callback.__name__)

        return guarded

    async def _on_error(self, error: Exception) -> None:
        task = asyncio.current_task()
        if task is not None and task.get_name() == KEEPER and task.cancelling():
            # wait_for of Python 3.11 drops a cancellation that arrives together with a refused
            # connection, and nats-py would then try the next server, forever.
            raise asyncio.CancelledError
        text = error_text(error)
        if "permissions violation" in text.lower():
            self.permission_errors += 1
            if text in self._denials or len(self._denials) < DENIALS_KEPT:
                if text not in self._denials:
                    self._log.error("bus.permission_denied", error=text)
                self._denials[text] = time.monotonic()
            return
        self.last_error = text
        if not self.connected and len(self.failures) < FAILURES_KEPT:
            self.failures.append(text)
            self._news.set()
        if not self.connected and text != self._logged:
            self._logged = text
            self._log.warning("bus.connect_failed", url=self._url, error=text)

    async def _on_lost(self) -> None:
        if self._up.is_set():
            self._up.clear()
            if time.monotonic() - self._up_at > STEADY_S:
                self._backoff.reset()
            self._log.warning("bus.disconnected", error=self.last_error)
        for listener in list(self._loss_listeners):
            self._notify(listener)

    async def _on_reconnected(self) -> None:
        self.reconnects += 1
        self._came_up(fresh=False)

    async def _on_closed(self) -> None:
        self._on_dead("closed")

    def _on_dead(self, reason: str) -> None:
        self.last_error = self.last_error or reason
        self._up.clear()
        self._dead.set()

    def _came_up(self, *, fresh: bool) -> None:
        self._logged = self.last_error = ""
        self._up_at = time.monotonic()
        self._up.set()
        self._news.set()
        self._log.info("bus.connected", url=self._url, reconnects=self.reconnects)
        for listener in list(self._listeners):
            self._notify(partial(listener, fresh))

    def _notify(self, listener: Callable[[], None]) -> None:
        """An exception in one listener must not keep the others from being called."""
        try:
            listener()
        except Exception:
            if Guard.SAFE_CALLBACKS not in self.guards:
                raise
            self._log.exception("bus.listener_failed")

    # -- for the worker ----------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def client(self) -> GuardedClient | None:
        """The current client, for tests and for subscriptions that must know theirs."""
        return self._client

    async def wait_connected(self) -> None:
        await self._up.wait()

    async def wait_tried(self, attempts: int) -> bool:
        """Until it is connected, or so many attempts failed (`failures`); whether it is."""
        while not self._up.is_set() and len(self.failures) < min(attempts, FAILURES_KEPT):
            self._news.clear()
            await self._news.wait()
        return self._up.is_set()

    def denial(self, subject: str, since: float) -> str:
        """What the server said when it refused a message to this subject; empty if it did not.

        Only what it said since that time of `time.monotonic` counts: permissions change. The text
        is in lower case, as the parser passes it on.
        """
        sought = f'publish to "{subject.lower()}"'
        return next(
            (text for text, at in self._denials.items() if at >= since and sought in text), ""
        )

    def on_up(self, listener: Callable[[bool], None]) -> None:
        """Call `listener(fresh)` after each (re)connect; fresh: subscriptions are gone."""
        self._listeners.append(listener)

    def on_loss(self, listener: Callable[[], None]) -> None:
        """Call `listener()` when the connection was lost."""
        self._loss_listeners.append(listener)

    def new_inbox(self) -> str:
        return self._current().new_inbox()

    async def send(
        self,
        subject: str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Write to the socket: at most once, and not at all without a connection.

        Raises:
            Unsendable: too large for the server, or an invalid subject or header.
            BusError: not connected.
        """
        client = self._current()
        self._put(client, subject, payload, reply, headers)
        if client.congested:
            with NatsCall(subject, cancellable=self._cancellable):
                await client.relieved()

    def send_now(self, messages: Iterable[tuple[str, bytes]]) -> int:
        """Send each to its subject, all by one system call; returns how many were sent.

        The first that fails, or would have to wait, is the last one that is looked at.
        """
        sent = 0
        try:
            client = self._current()
            for subject, payload in messages:
                if client.congested:
                    break
                self._put(client, subject, payload, "", None)
                sent += 1
            if not client.write_now():
                return 0
        except BusError:
            pass
        return sent

    def _put(
        self,
        client: GuardedClient,
        subject: str,
        payload: bytes,
        reply: str,
        headers: Mapping[str, str] | None,
    ) -> None:
        with NatsCall(subject):
            block = encode_headers(headers)
            _check_sendable(client, subject, len(payload) + len(block))
            client.put(subject, payload, headers=block, reply=reply)

    async def request(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Message:
        """Send and wait for one answer.

        Raises:
            NoResponder: no stream or service has that subject.
            Unsendable: too large for the server, or an invalid subject or header.
            BusError: no answer in time, or the connection was lost.
        """
        limit_s = self.tuning.request_timeout_s if timeout_s is None else timeout_s
        client = self._current()
        with NatsCall(subject, cancellable=self._cancellable):
            block = encode_headers(headers)
            _check_sendable(client, subject, len(payload) + len(block))
            answer = await client.ask(subject, payload, headers=block, timeout_s=limit_s)
        if answer.headers.get("Status") == NO_RESPONDERS:
            raise NoResponder(f"{subject}: no responders")
        return answer

    async def subscribe(
        self, subject: str, receive: Callable[[Message], None], *, queue: str = ""
    ) -> Subscription:
        """Subscribe until the client is replaced; `receive` must return at once."""
        with NatsCall(subject, cancellable=self._cancellable):
            return await self._current().listen(subject, receive, queue=queue)

    async def settle(self) -> None:
        """Return once the server has taken all that was sent, e.g. a subscription.

        Raises:
            BusError: it does not answer in time, or the connection was lost.
        """
        with NatsCall("PING", cancellable=self._cancellable):
            await self._current().settle(self.tuning.request_timeout_s)

    def _current(self) -> GuardedClient:
        client = self._client
        if client is None or not client.is_connected:
            raise BusError(f"not connected to {self._url}: {self.last_error or 'starting'}")
        return client


def _contents(settings: NatsSettings) -> tuple[object, ...]:
    """What a connection is made from, files by their content's hash. Raises OSError."""
    paths = [path for path in (settings.creds, settings.tls) if path]
    hashes = [hashlib.sha256(Path(path).read_bytes()).digest() for path in paths]
    return settings.url, settings.creds, settings.tls, *hashes


def _check_sendable(client: Client, subject: str, size: int) -> None:
    """Refuse what the server would answer with -ERR and the end of the connection.

    `size` is that of payload and headers: the server counts both.

    Raises:
        Unsendable: what is too large, or cannot be encoded.
    """
    if not subject.isascii():
        raise Unsendable(f"{subject!a}: subject cannot be encoded")
    if size > client.max_payload:
        raise Unsendable(
            f"{subject}: {size} bytes with headers, the server's max_payload is"
            f" {client.max_payload}",
            limit_bytes=client.max_payload,
        )
