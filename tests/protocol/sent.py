"""Every message that a worker sends, kept in a file; `validators.py` holds it against the schemas.

`python -m tests.protocol.sent MODULE` is `python -m MODULE`, a worker, and appends what it hands
to the bus to the file that `SENT_TO` names: events, replies, dead letters, state values and answers
to queries, also those whose sending fails.
"""

import contextlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from schemas.protocol.ids import answer_name
from worker.intake import Intake
from worker.lease import Lease
from worker.outbox import Outbox
from worker.queries import service
from worker.state_writer import StateWriter

SENT_TO = "SENT_TO"
STREAM = re.compile(r"\.(evt|reply|dead)\.(?:instance|network|host)\b")
SCHEMAS = {"evt": "event", "reply": "reply"}


class Sent(NamedTuple):
    """One message: the name of its schema, its payload, its headers if those have the schema."""

    schema: str
    payload: bytes
    headers: dict[str, str]


Keep = Callable[[Sent], None]


class RecordingBus:
    """A bus that also keeps what it is given."""

    def __init__(self, bus: Any, keep: Keep) -> None:
        self._bus, self._keep = bus, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def publish(
        self, subject: str, payload: bytes, *, msg_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        found = STREAM.search(subject)
        assert found, subject
        if found[1] == "dead":
            self._keep(Sent("dead.headers", b"", {"Nats-Msg-Id": msg_id, **(headers or {})}))
        else:
            self._keep(Sent(SCHEMAS[found[1]], payload, {}))
        await self._bus.publish(subject, payload, msg_id=msg_id, headers=headers)

    async def send(self, subject: str, payload: bytes) -> None:
        self._keep(Sent("reply", payload, {}))
        await self._bus.send(subject, payload)

    def send_now(self, messages: Iterable[tuple[str, bytes]]) -> int:
        every = list(messages)
        for _, payload in every:
            self._keep(Sent("reply", payload, {}))
        sent: int = self._bus.send_now(every)
        return sent

    async def write_state(self, key: str, value: bytes, *, revision: int | None) -> int:
        self._keep(Sent(f"state.{key.split('.')[1]}", value, {}))
        written: int = await self._bus.write_state(key, value, revision=revision)
        return written


def record(keep: Keep) -> None:
    """From now on, in this process, all that a worker sends."""
    for kind in (Intake, Lease, Outbox, StateWriter):
        _give_recording_bus(kind, keep)
    answer = service.answer

    async def kept(verb: str, query: Any, message: Any) -> tuple[bytes, str]:
        packed, failure = await answer(verb, query, message)
        keep(Sent(answer_name(verb), packed, {}))
        return packed, failure

    service.answer = kept


def _give_recording_bus(kind: Any, keep: Keep) -> None:
    made = kind.__init__

    def init(self: Any, bus: Any, *args: Any, **options: Any) -> None:
        made(self, RecordingBus(bus, keep), *args, **options)

    kind.__init__ = init


def record_to(path: str) -> None:
    """As `record`, to a file; a message is in it whole, also after kill -9.

    What a test's limit or full disk keeps out of it is not checked: the worker must not notice.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def keep(sent: Sent) -> None:
        with contextlib.suppress(OSError):
            os.write(fd, msgspec.json.encode(sent) + b"\n")

    record(keep)


def read(path: str) -> Iterator[Sent]:
    """The messages of a file, each once, without those that were cut; none if there is no file."""
    if not os.path.exists(path):
        return
    seen: set[bytes] = set()
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n") and line not in seen:
                seen.add(line)
                with contextlib.suppress(msgspec.DecodeError):
                    yield msgspec.json.decode(line, type=Sent)


if __name__ == "__main__":
    module = sys.argv.pop(1)
    record_to(os.environ[SENT_TO])
    runpy.run_module(module, run_name="__main__", alter_sys=True)
