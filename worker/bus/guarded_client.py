"""nats-py's client with a guard for each of its defects after which a worker receives nothing.

The private methods overridden here and in its base classes are checked at start (`check_library`),
because a new nats-py may rename them. No subjects, no policy: `connection.py` decides when to
connect.
Each guard can be left out, so that the tests in tests/broker show what it prevents.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportMissingTypeArgument=false

import asyncio
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from typing import Any

import structlog
from nats import errors
from nats.aio.client import Client, Srv
from nats.aio.transport import TcpTransport
from nats.protocol.parser import PERMISSIONS_ERR

from worker.bus.lean_client import LeanClient

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class Guard(StrEnum):
    """One per defect of nats-py; its test shows what happens without it."""

    LATE_PONG = "late_pong"
    DEAD_READER = "dead_reader"
    FATAL_ERR = "fatal_err"
    SAFE_CALLBACKS = "safe_callbacks"
    JITTER = "jitter"
    ABORT = "abort"
    PING = "ping"
    REBUILD = "rebuild"
    FAIL_FAST = "fail_fast"
    REREAD_CREDS = "reread_creds"
    REPULL = "repull"
    HEARTBEAT = "heartbeat"
    FRESH_INBOX = "fresh_inbox"
    STATUS = "status"
    MSG_ID = "msg_id"
    CANCEL = "cancel"
    RAW_ABORT = "raw_abort"
    DISCARD = "discard"
    PARSER = "parser"


ALL_GUARDS = frozenset(Guard)

_OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_process_info": ("self", "info", "initial_connection"),
    "_process_headers": ("self", "headers"),
    "_process_msg": ("self", "sid", "subject", "reply", "data", "headers"),
    "_process_pong": ("self",),
    "_read_loop": ("self",),
    "_process_err": ("self", "err_msg"),
    "_process_op_err": ("self", "e"),
    "_attempt_reconnect": ("self",),
    "_connect_to_server": ("self", "s"),
    "_select_next_server": ("self",),
}
_OVERRIDDEN_PLAIN: dict[str, tuple[str, ...]] = {
    "_connect_command": ("self",),
    "_build_message": ("self", "sid", "subject", "reply", "data", "headers"),
    "_remove_sub": ("self", "sid", "max_msgs"),
}
_READ = (
    "_ps",
    "_max_payload",
    "_pongs",
    "_pongs_received",
    "_pings_outstanding",
    "_reading_task",
    "_status",
    "_pending",
    "_pending_data_size",
    "_max_pending_size",
    "_flush_queue",
    "_transport",
    "_sid",
    "_reconnection_task",
    "_ping_interval_task",
    "_flusher_task",
    "_subs",
)
_READ_OF_TRANSPORT = ("_io_writer", "_bare_io_writer")


@dataclass(frozen=True, slots=True)
class Tuning:
    """Times in seconds. A stalled connection is detected within `ping_s * (pings + 1)`."""

    ping_s: float = 3.0
    pings: int = 2
    connect_timeout_s: float = 2.0
    backoff_base_s: float = 0.25
    backoff_cap_s: float = 1.5
    request_timeout_s: float = 5.0
    pending_bytes: int = 262_144
    heartbeat_s: float = 4.0
    pull_expires_s: float = 30.0
    missing_retry_s: float = 1.0
    check_s: float = 60.0


STANDARD = Tuning()


class LibraryMismatch(Exception):
    """The installed nats-py differs from the one that the guards were written for."""


def check_library() -> None:
    """Check that the installed nats-py has what the guards override and read.

    Raises:
        LibraryMismatch: install the nats-py of the lock file.
    """
    wrong: list[str] = []
    for name, parameters in {**_OVERRIDDEN, **_OVERRIDDEN_PLAIN}.items():
        method = getattr(Client, name, None)
        if method is None or inspect.iscoroutinefunction(method) != (name in _OVERRIDDEN):
            wrong.append(name)
        elif tuple(inspect.signature(method).parameters) != parameters:
            wrong.append(f"{name}{inspect.signature(method)}")
    fresh = Client()
    wrong += [name for name in _READ if not hasattr(fresh, name)]
    transport = TcpTransport()  # type: ignore[no-untyped-call]
    wrong += [name for name in _READ_OF_TRANSPORT if not hasattr(transport, name)]
    if wrong:
        raise LibraryMismatch(
            f"nats-py {version('nats-py')} differs from the version that hostd supports in"
            f" {', '.join(wrong)}: install the version of requirements.lock"
        )


class Backoff:
    """Delays before the next attempt, full jitter: uniform in 0..min(cap, base * 2^n) seconds."""

    def __init__(self, base_s: float, cap_s: float, *, jitter: bool = True) -> None:
        self._base_s, self._cap_s, self._jitter = base_s, cap_s, jitter
        self._attempt = 0

    def next_s(self) -> float:
        limit_s = min(self._cap_s, self._base_s * float(2 ** min(self._attempt, 16)))
        self._attempt += 1
        return random.uniform(0, limit_s) if self._jitter else self._cap_s  # noqa: S311

    def reset(self) -> None:
        self._attempt = 0


class GuardedClient(LeanClient):
    """One connection, used once: when `dead` is called, build another.

    Args:
        guards: those in effect.
        backoff: the wait before each attempt to connect.
        dead: called at most once, when this object cannot reconnect any more; must not raise.
        tls: send CONNECT only over TLS.
    """

    def __init__(
        self,
        guards: frozenset[Guard],
        backoff: Backoff,
        dead: Callable[[str], None],
        *,
        tls: bool = False,
    ) -> None:
        super().__init__(tls=tls, own_parser=Guard.PARSER in guards)
        self._guards = guards
        self._backoff = backoff
        self._dead = dead

    async def _process_pong(self) -> None:
        # A PONG after its flush() timed out sets a cancelled future: InvalidStateError ends the
        # reader while is_connected stays true.
        if Guard.LATE_PONG not in self._guards:
            await super()._process_pong()
            return
        if self._pongs:
            waiter = self._pongs.pop(0)
            if not waiter.done():
                waiter.set_result(True)
        self._pongs_received += 1
        self._pings_outstanding = 0

    async def _read_loop(self) -> None:
        # Upstream logs any exception that it did not expect and leaves the connection unread.
        mine = asyncio.current_task()
        await super()._read_loop()
        if (
            Guard.DEAD_READER in self._guards
            and self._reading_task is mine
            and self._status == Client.CONNECTED
        ):
            await self._process_op_err(errors.UnexpectedEOF())

    async def _process_err(self, err_msg: str) -> None:
        # Upstream closes the client on every -ERR but two: credentials that expire or rotate, or a
        # connection limit, would disconnect the worker until a restart.
        if Guard.FATAL_ERR not in self._guards or PERMISSIONS_ERR in err_msg:
            await super()._process_err(err_msg)
            return
        error = errors.Error("nats: " + err_msg.strip("'"))
        self._err = error
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _attempt_reconnect(self) -> None:
        # An orderly close waits until what is buffered is sent: to a stalled peer, forever.
        if Guard.ABORT in self._guards:
            self._abort_transport()
        # Requests would wait for their full timeout although no answer can arrive.
        if Guard.FAIL_FAST in self._guards:
            self.fail_asked()
        try:
            await super()._attempt_reconnect()
        except Exception as error:
            if self.is_closed or self._reconnection_task is not asyncio.current_task():
                return  # another task reconnects, or the client was closed
            # Upstream would stay "reconnecting" without a task that does it.
            log.exception("bus.reconnect_failed")
            if Guard.REBUILD in self._guards:
                self._dead(f"reconnecting failed: {type(error).__name__}: {error}")

    async def _select_next_server(self) -> None:
        # Upstream waits a fixed time, the same on every host: a thundering herd after a restart.
        if Guard.JITTER not in self._guards:
            await super()._select_next_server()
            return
        while True:
            if not self._server_pool:
                self._current_server = None
                raise errors.NoServersError
            server = self._server_pool.pop(0)
            self._server_pool.append(server)
            await asyncio.sleep(self._backoff.next_s())
            try:
                await self._connect_to_server(server)
            except (TimeoutError, OSError, errors.Error) as error:
                self._err = error
                await self._error_cb(error)
            else:
                self._current_server = server
                return

    async def _connect_to_server(self, s: Srv) -> None:
        # Upstream forgets the socket of an attempt that was refused: one descriptor each time.
        self._abort_transport()
        await super()._connect_to_server(s)

    def _abort_transport(self) -> None:
        # Below TLS: its transport, once closed twice as upstream does, aborts nothing any more; in
        # Python 3.11.2, Debian 12's, that raises AttributeError at every attempt to reconnect.
        raw = Guard.RAW_ABORT in self._guards
        writer: Any = getattr(self._transport, "_bare_io_writer" if raw else "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    def abort(self) -> None:
        """Drop the socket without sending what is buffered."""
        self._abort_transport()

    async def end_tasks(self) -> None:
        """End what nats-py leaves running where its `close` was cut or failed: it cancels its own
        tasks only near the end of a close, and a lost one would reconnect behind our back."""
        tasks = [
            self._reading_task,
            self._ping_interval_task,
            self._reconnection_task,
            self._flusher_task,
            *(vars(each).get("_wait_for_msgs_task") for each in self._subs.values()),
        ]
        mine = asyncio.current_task()
        running = [task for task in tasks if task is not None and task is not mine]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
