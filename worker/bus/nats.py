"""The bus over NATS JetStream: commands in; replies, events and state out.

Streams, bucket and consumer are only used and checked here; `provision.py` creates them, with
other credentials. No ordered consumers and no KV watches on this connection: with version 2 ack
subjects they end nats-py's reader.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import structlog

from schemas.settings import NatsSettings
from schemas.subjects import Subjects
from worker.bus import accounts, api_reply, streams, verify
from worker.bus.ack_window import EVERY_S, AckWindow
from worker.bus.connection import Connection
from worker.bus.guarded_client import ALL_GUARDS, STANDARD, Guard, Tuning
from worker.bus.lean_client import encode_headers
from worker.bus.message import Message, NoResponder
from worker.bus.protocol import BusError, NotProvisioned, Receive, StateConflict, Unsendable
from worker.bus.pull_consumer import PullLoop

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

MAX_TRIED = 20_000
WRONG_LAST_SEQUENCE = (10071, 10164)
MESSAGE_TOO_LARGE = 10054


class NatsBus:
    """One host's bus; implements `worker.bus.protocol.Bus`.

    `trouble` is "" or the reason why no commands arrive although the server is reachable;
    `connected`, `reconnects`, `permission_errors`, `pulls` and `taken_msg_ids` are for metrics.

    Args:
        settings: `[nats]`.
        subjects: this host's names.
        guards: all of them, except in tests.
        window: maximum of concurrent deliveries.
        tuning: times.
    """

    def __init__(
        self,
        settings: NatsSettings,
        subjects: Subjects,
        *,
        guards: frozenset[Guard] = ALL_GUARDS,
        window: int = 64,
        tuning: Tuning = STANDARD,
        name: str = "",
    ) -> None:
        self.subjects = subjects
        self.connection = Connection(
            settings,
            name=name or f"hostd/{subjects.host_id}",
            inbox=streams.inbox_prefix(subjects.host_id),
            guards=guards,
            tuning=tuning,
        )
        # The streams in which another host can have used an ID.
        self._ids_shared = frozenset({subjects.replies_stream, subjects.dead_stream})
        self._js_domain = settings.js_domain
        self._api = streams.js_api(settings.js_domain)
        self._window = window
        self._loop: PullLoop | None = None
        self._paused = False
        self._pulls_before = 0
        self._last_before: dict[str, int] = {}
        self._tried: dict[bytes, bool] = {}  # IDs published since the start: taken by another?
        self.taken_msg_ids = 0
        self.trouble = ""
        self.ack_window = AckWindow()
        self.stream_sizes: dict[str, tuple[int, int]] = {}  # by kind: bytes and bound, at a check

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start connecting; returns at once, with or without a server."""
        await self.connection.start()

    async def close(self) -> None:
        """After `consume` was cancelled and everything is published: disconnect."""
        await self.connection.close()

    @property
    def connected(self) -> bool:
        return self.connection.connected

    @property
    def reconnects(self) -> int:
        return self.connection.reconnects

    @property
    def permission_errors(self) -> int:
        return self.connection.permission_errors

    @property
    def pulls(self) -> int:
        """Pull requests sent since the start."""
        return self._pulls_before + (self._loop.pulls if self._loop else 0)

    @property
    def turns(self) -> int | None:
        """Of the loop that pulls commands, with or without a connection; None before it runs."""
        return self._loop.turns if self._loop else None

    def on_connection(self, changed: Callable[[], None]) -> None:
        """Call `changed()` after each connect and each loss; it must return at once."""
        self.connection.on_up(lambda _fresh: changed())
        self.connection.on_loss(changed)

    # -- provisioning ------------------------------------------------------------------------------

    async def verify(self) -> None:
        """Check that streams, consumer and bucket are what the worker needs.

        Raises:
            NotProvisioned: what is missing or wrong, and what to run.
            BusError: no answer now; try again.
        """
        found = await verify.verify(self.connection, self.subjects, self._js_domain)
        kinds = streams.kinds(self.subjects)
        self.stream_sizes = {
            kinds[name]: (each.size_bytes, each.max_bytes) for name, each in found.items()
        }
        if not self._last_before:
            self._last_before = {name: each.last_seq for name, each in found.items()}

    async def dead_letters(self) -> int:
        """How many dead letters of this host are kept.

        Raises:
            BusError: no answer now.
        """
        return await verify.count_dead(self.connection, self.subjects, self._js_domain)

    async def wait_provisioned(self) -> None:
        """Return when `verify` succeeds; log what is wrong each time that it changes."""
        while True:
            try:
                await self.connection.wait_connected()
                await self.verify()
            except BusError as error:
                self._set_trouble(str(error))
                await asyncio.sleep(self.connection.tuning.missing_retry_s)
            else:
                self._set_trouble("")
                return

    def _set_trouble(self, text: str) -> None:
        if text == self.trouble:
            return
        self.trouble = text
        if text:
            log.error("bus.not_provisioned", problem=text)
        else:
            log.info("bus.provisioned", stream=self.subjects.commands_stream)

    # -- commands in -------------------------------------------------------------------------------

    async def consume(self, receive: Receive) -> None:
        """Pull commands until cancelled, then wait for those being received."""
        loop = PullLoop(
            self.connection,
            self.subjects.commands_stream,
            self.subjects.consumer,
            receive,
            check=self.verify,
            api=self._api,
            window=self._window,
            trouble=self._set_trouble,
        )
        if self._paused:
            loop.pause()
        if self._loop is None:
            self.connection.on_up(lambda fresh: self._loop.on_up(fresh) if self._loop else None)
        else:
            self._pulls_before += self._loop.pulls
        self._loop = loop
        watch = asyncio.create_task(self._watch(loop), name="configuration")
        if Guard.STATUS not in self.connection.guards:
            watch.cancel()
        try:
            await loop.run()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, loop: PullLoop) -> None:
        """Compare the configuration from time to time, after each connect and on advisories."""
        changed = asyncio.Event()
        fresh = asyncio.Event()
        fresh.set()

        def on_up(is_fresh: bool) -> None:
            changed.set()
            if is_fresh:
                fresh.set()

        def on_advisory(_: Message) -> None:
            changed.set()

        self.connection.on_up(on_up)
        while True:
            await self.connection.wait_connected()
            try:
                if fresh.is_set():
                    for subject in accounts.advisory_subjects(self.subjects):
                        await self.connection.subscribe(subject, on_advisory)
                    fresh.clear()
                if not self.trouble:
                    await self.verify()
            except NotProvisioned as error:
                self._set_trouble(str(error))
                loop.check_now()
            except BusError as error:
                log.warning("bus.check_failed", error=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.connection.tuning.check_s):
                    await changed.wait()
            changed.clear()

    async def watch_acks(self, *, every_s: float = EVERY_S) -> None:
        """Keep `ack_window` up to date until cancelled."""
        stream, consumer = self.subjects.commands_stream, self.subjects.consumer
        while True:
            try:
                answer = await self.connection.request(
                    f"{self._api}CONSUMER.INFO.{stream}.{consumer}", b""
                )
                self.ack_window.observe(api_reply.read_reply(answer.data, consumer))
            except (BusError, KeyError, TypeError, AttributeError) as error:
                log.debug("bus.ack_window_unknown", error=repr(error))
            await asyncio.sleep(every_s)

    def pause(self) -> None:
        self._paused = True
        if self._loop:
            self._loop.pause()

    def resume(self) -> None:
        self._paused = False
        if self._loop:
            self._loop.resume()

    # -- replies, events, dead letters out ---------------------------------------------------------

    async def publish(
        self, subject: str, payload: bytes, *, msg_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish to the stream of this subject, acknowledged; a duplicate of our own is success.

        Raises:
            NotProvisioned: no stream is bound to that subject.
            BusError: not stored now; publish again with the same `msg_id`.
        """
        sent = {**(headers or {})}
        stream = streams.stream_of(self.subjects, subject)
        if stream:
            sent["Nats-Expected-Stream"] = stream
        if Guard.MSG_ID not in self.connection.guards:
            await self._store(subject, payload, sent)
            return
        sent["Nats-Msg-Id"] = msg_id
        if await self._published(subject, payload, sent, stream):
            return
        digest = hashlib.sha256(subject.encode() + payload).hexdigest()[:32]
        sent["Nats-Msg-Id"] = f"{msg_id}:{digest}"
        if await self._published(subject, payload, sent, stream):
            return
        del sent["Nats-Msg-Id"]  # stored in any case
        await self._store(subject, payload, sent)

    async def _published(
        self, subject: str, payload: bytes, headers: Mapping[str, str], stream: str | None
    ) -> bool:
        """Publish; false if the server drops it as a copy of somebody else's message.

        An ID is taken in the whole stream, so a message of another host can have it. The position
        of the message that has it tells whose it is (ADR 0209).
        """
        if stream not in self._ids_shared:
            await self._store(subject, payload, headers)  # IDs of events cannot be guessed
            return True
        text = f"{subject} {headers['Nats-Msg-Id']}"
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        taken = self._tried.get(key)
        if taken:
            return False
        self._tried[key] = False
        while len(self._tried) > MAX_TRIED:
            self._tried.pop(next(iter(self._tried)))
        ack = await self._store_acked(subject, payload, headers)
        if not ack.get("duplicate"):
            return True
        first: int = ack["seq"]
        since_start = first > self._last_before.get(stream, first)
        if first <= await self._last_sequence(stream, subject) and not (
            since_start and taken is None
        ):
            return True
        self._tried[key] = True
        self.taken_msg_ids += 1
        log.warning("bus.msg_id_rejected", subject=subject, msg_id=headers["Nats-Msg-Id"])
        return False

    async def _last_sequence(self, stream: str, subject: str) -> int:
        """Of the last message on that subject; 0 if there is none."""
        answer = await self.connection.request(f"{self._api}DIRECT.GET.{stream}.{subject}", b"")
        sequence = answer.headers.get("Nats-Sequence", "")
        if answer.headers.get("Status") == "404":
            return 0
        if (number := api_reply.header_number(sequence)) is None:
            raise BusError(f"{subject}: cannot read the last message of {stream}")
        return number

    async def send(self, subject: str, payload: bytes) -> None:
        """Publish with core NATS, at most once. Raises BusError without a connection."""
        await self.connection.send(subject, payload)

    def send_now(self, messages: Iterable[tuple[str, bytes]]) -> int:
        """As `send`, without waiting or raising; returns how many were sent."""
        return self.connection.send_now(messages)

    async def _store(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> int:
        """The sequence number of the stored message."""
        seq: int = (await self._store_acked(subject, payload, headers))["seq"]
        return seq

    async def _store_acked(
        self, subject: str, payload: bytes, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """The PubAck, with an integer `seq`."""
        try:
            answer = await self.connection.request(subject, payload, headers=headers)
        except NoResponder as error:
            raise NotProvisioned(
                f"no JetStream stream is bound to {subject}: run `hostd provision` for cell"
                f" {self.subjects.cell}"
            ) from error
        what = f"{subject}: invalid PubAck"
        found = api_reply.read_reply(answer.data, what)
        if "error" not in found:
            return {**found, "seq": api_reply.sequence_of(found, "seq", what)}
        code, text = found["error"].get("err_code"), found["error"].get("description")
        if code in WRONG_LAST_SEQUENCE:
            raise StateConflict(f"{subject}: {text}")
        if code == MESSAGE_TOO_LARGE:
            # The stream's limit is not in the answer: half of what was too much.
            size = len(payload) + len(encode_headers(headers))
            raise Unsendable(f"{subject}: {text} (error {code})", limit_bytes=size // 2)
        raise BusError(f"{subject}: {text} (error {code})")

    # -- state -------------------------------------------------------------------------------------

    async def read_state(self, key: str) -> tuple[bytes, int] | None:
        """The value and its revision; None if the key is absent or deleted. Raises BusError."""
        value, revision = await self._last(key)
        return None if value is None else (value, revision)

    async def write_state(self, key: str, value: bytes, *, revision: int | None) -> int:
        """Compare-and-set; `revision` 0 means absent, None any revision.

        Raises:
            StateConflict: the key is at another revision; read it back.
            BusError: not stored now, or stored with a lost acknowledgement; read it back.
        """
        return await self._set(key, value, {}, revision)

    async def delete_state(self, key: str, *, revision: int | None) -> None:
        """Write a delete marker; deleting an absent key is success. Raises as `write_state`."""
        if revision is None and (await self._last(key))[0] is None:
            return
        await self._set(key, b"", {"KV-Operation": "DEL"}, revision)

    async def _set(
        self, key: str, value: bytes, headers: Mapping[str, str], revision: int | None
    ) -> int:
        subject = streams.state_subject(self.subjects, key)
        sent = dict(headers)
        if revision is not None:
            sent["Nats-Expected-Last-Subject-Sequence"] = str(revision)
        try:
            return await self._store(subject, value, sent)
        except StateConflict:
            if revision != 0:
                raise
            # A delete marker has a revision too, although the key is absent.
            present, marked = await self._last(key)
            if present is not None or not marked:
                raise
            sent["Nats-Expected-Last-Subject-Sequence"] = str(marked)
            return await self._store(subject, value, sent)

    async def _last(self, key: str) -> tuple[bytes | None, int]:
        """Value (None: absent or deleted) and revision (0: absent)."""
        stream = streams.bucket_stream(self.subjects)
        subject = streams.state_subject(self.subjects, key)
        try:
            answer = await self.connection.request(f"{self._api}DIRECT.GET.{stream}.{subject}", b"")
        except NoResponder as error:
            raise NotProvisioned(
                f"no bucket {self.subjects.state_bucket}: run `hostd provision` for cell"
                f" {self.subjects.cell}"
            ) from error
        status = answer.headers.get("Status")
        if status == "404":
            return None, 0
        sequence = answer.headers.get("Nats-Sequence", "")
        number = api_reply.header_number(sequence)
        if status is not None or number is None:
            raise BusError(f"{key}: {status} {answer.headers.get('Description', 'no sequence')}")
        deleted = answer.headers.get("KV-Operation") in ("DEL", "PURGE")
        return (None if deleted else answer.data), number
