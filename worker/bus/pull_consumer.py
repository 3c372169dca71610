"""Continuous pull from one durable consumer that survives every loss of a pull, within a window.

nats-py has no continuous consume; its `fetch` is not repeated after a reconnect and does not tell a
deleted consumer from an idle one. So this module counts itself: `credit` is the number of messages
that the server may still deliver; a pull that may be lost is replaced under a new inbox, so that
the old one cannot deliver in addition. The content of a message is not interpreted here.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from worker.bus.api_reply import header_number
from worker.bus.connection import Connection
from worker.bus.guarded_client import Guard
from worker.bus.message import Message, Subscription
from worker.bus.protocol import BusError, Delivery, NotProvisioned, Receive

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

ACK = b"+ACK"
GRACE_S = 5.0
MSG_SIZE = "Nats-Msg-Size"  # of a consumer with `headers_only`
MAX_BARE = 1024
UNANSWERED_MAX = 3  # in a row: a consumer that is just being created or moved is no trouble
# What a server writes into a message that it publishes: by `republish`, for a direct get, by a
# source or a mirror, by a schedule, or in place of an expired one. Commands come from agentd.
SERVER_HEADERS = frozenset(
    {
        "nats-stream",
        "nats-subject",
        "nats-sequence",
        "nats-last-sequence",
        "nats-time-stamp",
        "nats-num-pending",
        "nats-upto-sequence",
        "nats-stream-source",
        "nats-msg-size",
        "nats-marker-reason",
        "nats-scheduler",
    }
)
GONE = ("consumer deleted", "stream deleted", "consumer is push based")


class PullLoop:
    """Pulls until cancelled.

    Args:
        connection: the connection.
        stream: of the consumer.
        consumer: its durable name.
        receive: handles one delivery; at most `window` of them run at once.
        check: raises NotProvisioned with what is wrong, or BusError without an answer.
        api: prefix of the JetStream API.
        window: maximum of deliveries being received or still expected.
        trouble: called with a text when no commands can arrive, with "" when they can again.
    """

    def __init__(
        self,
        connection: Connection,
        stream: str,
        consumer: str,
        receive: Receive,
        *,
        check: Callable[[], Awaitable[None]],
        api: str = "$JS.API.",
        window: int = 64,
        trouble: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._connection = connection
        self._next = f"{api}CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._receive = receive
        self._check = check
        self._trouble = trouble
        self._window = window
        self._slots = asyncio.Semaphore(window)
        self._wake = asyncio.Event()
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._generation = 0
        self._stale = True
        self._missing = False
        self._checks = 0
        self._unanswered = 0
        self._bare: dict[int, int] = {}
        self._not_before = 0.0
        self._heard_at = 0.0
        self._paused = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.credit = 0
        self.pulls = 0
        self.turns = 0  # of the loop: it hangs if this stays

    # -- control -----------------------------------------------------------------------------------

    def pause(self) -> None:
        """Send no more pulls; messages of earlier pulls may still arrive."""
        self._paused = True
        self._stale = True
        self._wake.set()

    def resume(self) -> None:
        self._paused = False
        self._wake.set()

    def on_up(self, fresh: bool) -> None:
        """The connection is new: pulls of the old one are lost or will expire."""
        if fresh or Guard.REPULL in self._connection.guards:
            self._stale = True
            self._not_before = 0.0
            self._wake.set()

    def check_now(self) -> None:
        """Stop pulling until `check` succeeds."""
        self._missing = True
        self._stale = True
        self._wake.set()

    async def run(self) -> None:
        """Pull until cancelled, then wait for the deliveries being received."""
        try:
            while True:
                self.turns += 1
                self._wake.clear()
                await self._step()
                # Not wait_for: in Python 3.11 it loses a cancellation that arrives with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause_s()):
                        await self._wake.wait()
        finally:
            await self._unsubscribe()
            await self._finish()

    async def _finish(self) -> None:
        """What is not done in time is not acknowledged, and is delivered to the next worker."""
        if not self._tasks:
            return
        _, stuck = await asyncio.wait(set(self._tasks), timeout=GRACE_S)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)

    def _pause_s(self) -> float:
        if (left_s := self._not_before - time.monotonic()) > 0:
            return left_s
        return self._connection.tuning.heartbeat_s / 2

    async def _step(self) -> None:
        tuning = self._connection.tuning
        silent = time.monotonic() - self._heard_at > 2.5 * tuning.heartbeat_s
        if self.credit and silent and Guard.HEARTBEAT in self._connection.guards:
            self._stale = True
        if not self._connection.connected or time.monotonic() < self._not_before:
            return
        try:
            if self._missing:
                await self._check_again()
            if self._stale:
                await self._renew()
            await self._pull()
        except BusError as error:
            self._stale = True
            self._not_before = time.monotonic() + tuning.missing_retry_s * random.uniform(0.5, 1)  # noqa: S311
            if isinstance(error, NotProvisioned):
                self._trouble(str(error))

    async def _check_again(self) -> None:
        await self._unsubscribe()  # or an earlier pull would go on delivering
        await self._check()
        self._checks += 1
        self._missing = False
        if self._unanswered > UNANSWERED_MAX:
            self._trouble(
                f"nothing answers {self._next}, although the consumer exists: import it in the"
                " account of this host as `hostd provision --server-config` prints it"
            )
        else:
            self._trouble("")

    # -- pulls -------------------------------------------------------------------------------------

    async def _renew(self) -> None:
        """Subscribe to a new inbox; the server drops pulls of one without a subscriber."""
        if self._inbox and Guard.FRESH_INBOX not in self._connection.guards and self._subscription:
            self.credit, self._stale = 0, False
            return
        await self._unsubscribe()
        self._generation += 1
        self.credit = 0
        self._inbox = self._connection.new_inbox()
        self._subscription = await self._connection.subscribe(
            self._inbox, partial(self._on_message, self._generation)
        )
        self._stale = False

    async def _unsubscribe(self) -> None:
        old, self._subscription = self._subscription, None
        if old is not None:
            with contextlib.suppress(Exception):  # of a client that is closed or replaced
                await old.unsubscribe()

    def _wanted(self) -> int:
        """How many messages to ask for now; 0 while enough are expected."""
        count = self._window - self.credit - len(self._tasks)
        if self._paused or count <= 0 or (self.credit and count < self._window // 2):
            return 0
        return count

    async def _pull(self) -> None:
        count = self._wanted()
        if not count:
            return
        tuning = self._connection.tuning
        body = {
            "batch": count,
            "expires": int(tuning.pull_expires_s * 1e9),
            "idle_heartbeat": int(tuning.heartbeat_s * 1e9),
        }
        self.credit += count
        self.pulls += 1
        self._heard_at = time.monotonic()
        await self._connection.send(self._next, json.dumps(body).encode(), reply=self._inbox)

    # -- messages ----------------------------------------------------------------------------------

    def _on_message(self, generation: int, message: Message) -> None:
        self._heard_at = time.monotonic()
        if not message.reply:
            if generation == self._generation:
                self._on_status(message)
            return
        if self._unanswered:
            self._answered()
        if generation == self._generation:
            self.credit = max(0, self.credit - 1)
        task = asyncio.create_task(self._handle(message), name="receive")
        self._tasks.add(task)
        task.add_done_callback(self._handled)

    def _handled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._wanted():
            self._wake.set()

    async def _handle(self, message: Message) -> None:
        async with self._slots:
            try:
                delivery = to_delivery(message, self._connection)
                if self._headers_only(message, delivery.stream_seq):
                    self.check_now()
                else:
                    await self._receive(delivery)
            except BusError as error:
                log.warning("bus.ack_failed", subject=message.subject, error=str(error))
            except Exception:
                # Not acknowledged, so it is delivered again after ack_wait.
                log.exception("bus.receive_failed", subject=message.subject)

    def _headers_only(self, message: Message, stream_seq: int) -> bool:
        """Whether the consumer may have become one that delivers no payloads.

        Such a message must not be acknowledged: the command would be lost. It comes again; if it
        is still empty although the consumer was found right in between, its sender made it so.
        """
        if message.data or MSG_SIZE not in message.headers:
            return False
        if len(self._bare) > MAX_BARE:
            self._bare.clear()
        return self._checks == self._bare.setdefault(stream_seq, self._checks)

    def _answered(self) -> None:
        if self._unanswered > UNANSWERED_MAX:
            self._trouble("")
        self._unanswered = 0

    def _on_status(self, message: Message) -> None:
        status = message.headers.get("Status", "")
        if status == "503":
            self._unanswered += 1
        elif self._unanswered:
            self._answered()
        if status == "100":
            return
        text = message.headers.get("Description", "")
        pending = message.headers.get("Nats-Pending-Messages", "")
        if (number := header_number(pending)) is not None:
            self.credit = max(0, self.credit - number)
        elif status != "408" or self.credit:
            self._stale = True  # servers before 2.10 do not report what is pending
        self._wake.set()
        if status in ("404", "408"):
            return
        self._stale = True
        if Guard.STATUS not in self._connection.guards:
            self._not_before = time.monotonic() + 0.1
        elif status == "503" or text.lower() in GONE:
            self._missing = True
            if self._unanswered > UNANSWERED_MAX:
                self._not_before = time.monotonic() + self._connection.tuning.missing_retry_s
        elif status == "409" and not text.startswith("Exceeded"):
            # The consumer has a new leader, or the server shuts down.
            self._not_before = time.monotonic() + 0.1
        else:
            self._not_before = time.monotonic() + self._connection.tuning.missing_retry_s
            self._missing = True
            self._trouble(f"the server rejects pull requests: {status} {text}")


def to_delivery(message: Message, connection: Connection) -> Delivery:
    """Read the ack subject, in both of its forms.

    `$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>....` (9 tokens), or with domain and
    account hash after `$JS.ACK` (servers with `js_ack_fc_v2`).

    Raises:
        BusError: the reply subject has neither form.
    """
    tokens = message.reply.split(".")
    first = 4 if len(tokens) == 9 else 6
    numbers = [header_number(token) for token in tokens[first : first + 2]]
    match numbers:
        case [int(delivered), int(stream_seq)]:
            pass
        case _:
            raise BusError(f"expected an ack subject, found {message.reply[:200]!r}")

    async def ack() -> None:
        await connection.request(message.reply, ACK)

    headers = {name.lower(): value for name, value in message.headers.items()}
    return Delivery(
        subject=message.subject,
        data=message.data,
        msg_id=headers.get("nats-msg-id"),
        stream_seq=stream_seq,
        delivered=delivered,
        ack=ack,
        server_headers=tuple(sorted(SERVER_HEADERS & headers.keys())),
        traceparent=headers.get("traceparent"),
        tracestate=headers.get("tracestate"),
    )
