"""The bus in memory: streams that keep, redeliver and lose messages, and a broker that can fail."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from worker.bus.protocol import BusError, Delivery, Receive, StateConflict, Unsendable


@dataclass(frozen=True, slots=True)
class Published:
    """A message that a stream accepted."""

    subject: str
    payload: bytes
    msg_id: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class _Command:
    subject: str
    data: bytes
    msg_id: str | None
    seq: int
    delivered: int = 0
    server_headers: tuple[str, ...] = ()
    traceparent: str | None = None
    tracestate: str | None = None


@dataclass(slots=True)
class FakeBus:
    """Implements `worker.bus.protocol.Bus`. `up = False` is a broker that is down.

    A command stays in its stream until it is acknowledged and is delivered again by `redeliver`.
    The streams for published messages drop a known `msg_id`, however old. With `lose_next_ack` the
    stream keeps the next message, but its confirmation is lost. `max_payload` is the size of the
    largest message that the broker accepts.
    """

    commands: dict[int, _Command] = field(default_factory=dict[int, _Command])
    published: list[Published] = field(default_factory=list[Published])
    sent: list[tuple[str, bytes]] = field(default_factory=list[tuple[str, bytes]])
    state: dict[str, tuple[bytes, int]] = field(default_factory=dict[str, tuple[bytes, int]])
    up: bool = True
    max_payload: int = 1_048_576
    lose_next_ack: bool = False
    paused: bool = False
    dedupe_commands: bool = True
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    attempts: list[str] = field(default_factory=list[str])
    _seq: int = 0
    _known: set[str] = field(default_factory=set[str])
    _known_commands: set[str] = field(default_factory=set[str])
    _revision: int = 0
    _due: asyncio.Queue[int] = field(default_factory=asyncio.Queue[int])

    # -- the sender's side ---------------------------------------------------------------------

    def command(
        self,
        subject: str,
        data: bytes,
        msg_id: str | None = None,
        server_headers: tuple[str, ...] = (),
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> int | None:
        """Put a command into the stream; None if the stream dropped a duplicate `msg_id`."""
        if msg_id is not None and self.dedupe_commands:
            if msg_id in self._known_commands:
                return None
            self._known_commands.add(msg_id)
        self._seq += 1
        self.commands[self._seq] = _Command(
            subject,
            data,
            msg_id,
            self._seq,
            server_headers=server_headers,
            traceparent=traceparent,
            tracestate=tracestate,
        )
        self._due.put_nowait(self._seq)
        return self._seq

    def redeliver(self) -> None:
        """Redeliver everything that was not acknowledged."""
        for seq in self.commands:
            self._due.put_nowait(seq)

    def replies(self) -> list[Published]:
        return [p for p in self.published if ".reply." in p.subject]

    def events(self) -> list[Published]:
        return [p for p in self.published if ".evt." in p.subject]

    def dead(self) -> list[Published]:
        return [p for p in self.published if ".dead." in p.subject]

    def sent_to(self, subject: str) -> list[bytes]:
        return [payload for to, payload in self.sent if to == subject]

    async def until(
        self, *, replies: int = 0, sent: int = 0, events: int = 0, dead: int = 0
    ) -> None:
        """Wait until at least this many messages were published."""
        async with asyncio.timeout(20):
            while (
                len(self.replies()) < replies
                or len(self.sent) < sent
                or len(self.events()) < events
                or len(self.dead()) < dead
            ):
                self.changed.clear()
                await self.changed.wait()

    async def until_acked(self) -> None:
        """Wait until no command is left in the stream."""
        async with asyncio.timeout(20):
            while self.commands:
                self.changed.clear()
                await self.changed.wait()

    # -- the worker's side ---------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self.up

    async def consume(self, receive: Receive) -> None:
        async def hand_over(delivery: Delivery) -> None:
            await receive(delivery)

        async with asyncio.TaskGroup() as group:
            while True:
                seq = await self._due.get()
                command = self.commands.get(seq)
                if command is not None:
                    group.create_task(hand_over(self._delivery(command)))

    def delivery(self, seq: int) -> Delivery:
        """One command, for a test that calls `receive` itself."""
        return self._delivery(self.commands[seq])

    def _delivery(self, command: _Command) -> Delivery:
        command.delivered += 1

        async def ack() -> None:
            await asyncio.sleep(0)
            self._check_up()
            self.commands.pop(command.seq, None)
            self.changed.set()

        return Delivery(
            subject=command.subject,
            data=command.data,
            msg_id=command.msg_id,
            stream_seq=command.seq,
            delivered=command.delivered,
            ack=ack,
            server_headers=command.server_headers,
            traceparent=command.traceparent,
            tracestate=command.tracestate,
        )

    def pause(self) -> None:
        self.paused = True
        self.changed.set()

    def resume(self) -> None:
        self.paused = False
        self.changed.set()

    async def publish(
        self, subject: str, payload: bytes, *, msg_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.attempts.append(msg_id)
        self.changed.set()
        await asyncio.sleep(0)
        self._check_up()
        self._check_size(payload)
        stream = next(kind for kind in ("reply", "evt", "dead") if f".{kind}." in subject)
        key = f"{stream}:{msg_id}"
        if key not in self._known:
            self._known.add(key)
            self.published.append(Published(subject, payload, msg_id, dict(headers or {})))
            self.changed.set()
        if self.lose_next_ack:
            self.lose_next_ack = False
            raise BusError("the confirmation was lost")

    async def send(self, subject: str, payload: bytes) -> None:
        await asyncio.sleep(0)
        self._check_up()
        self._check_size(payload)
        self.sent.append((subject, payload))
        self.changed.set()

    def send_now(self, messages: Iterable[tuple[str, bytes]]) -> int:
        before = len(self.sent)
        for subject, payload in messages:
            if not self.up or len(payload) > self.max_payload:
                break
            self.sent.append((subject, payload))
        self.changed.set()
        return len(self.sent) - before

    async def read_state(self, key: str) -> tuple[bytes, int] | None:
        self._check_up()
        return self.state.get(key)

    async def write_state(self, key: str, value: bytes, *, revision: int | None) -> int:
        self._check_up()
        self._compare(key, revision)
        self._revision += 1
        self.state[key] = (value, self._revision)
        return self._revision

    async def delete_state(self, key: str, *, revision: int | None) -> None:
        self._check_up()
        self._compare(key, revision)
        self.state.pop(key, None)

    def _compare(self, key: str, revision: int | None) -> None:
        if revision is not None and self.state.get(key, (b"", 0))[1] != revision:
            raise StateConflict(f"{key} has another revision")

    def _check_size(self, payload: bytes) -> None:
        if len(payload) > self.max_payload:
            raise Unsendable("too large", limit_bytes=self.max_payload)

    def _check_up(self) -> None:
        if not self.up:
            raise BusError("the broker is down")
