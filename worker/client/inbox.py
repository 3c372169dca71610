"""One subject for all replies to this client, below which each command has its own.

The answer to a copy beyond the number that may wait says nothing of the command: it is dropped.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, cast

from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.unpack import ANSWER, unpack_map
from worker.bus.message import Message
from worker.client.link import Link

OF_A_COPY: Final = (Code.EXHAUSTED, "$.reply_to")  # code and `detail.path`; the contract, Bounds


class Expected:
    """The reply to one command, on its way.

    Attributes:
        subject: its `reply_to`.
        trouble: why the command could not be published last, or may be refused.
        maybe_stored: whether the stream has it, or may have it.
        digest: `request_digest` of its request.
    """

    def __init__(self, subject: str, digest: str) -> None:
        self.subject = subject
        self.digest = digest
        self.trouble = ""
        self.maybe_stored = False
        self.arrived: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()


class Inbox:
    """Hands over replies by host and command ID; what nobody expects any more is dropped, and so is
    the reply to another request that had the ID before."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._expected: defaultdict[str, list[Expected]] = defaultdict(list)

    @classmethod
    @asynccontextmanager
    async def open(cls, link: Link, subject: str) -> AsyncGenerator["Inbox"]:
        """Subscribe below `subject`."""
        inbox = cls(subject)
        async with link.subscribed(f"{subject}.*.*", inbox._receive):
            yield inbox

    @contextmanager
    def expect(self, host: str, command_id: str, digest: str) -> Generator[Expected]:
        """Until the end of the block, take the host's reply to a command."""
        subject = f"{self._subject}.{host}.{command_id}"
        expected = Expected(subject, digest)
        self._expected[subject].append(expected)
        try:
            yield expected
        finally:
            self._expected[subject].remove(expected)
            if not self._expected[subject]:
                del self._expected[subject]

    def _receive(self, message: Message) -> None:
        waiting = self._expected.get(message.subject)
        if not waiting:
            return
        reply = _map_of(message.data)
        if _is_of_a_copy(reply):
            return
        for expected in waiting:
            if reply.get("request_digest") not in {None, expected.digest}:
                continue
            if not expected.arrived.done():
                expected.arrived.set_result(message.data)


def _map_of(data: bytes) -> dict[str, object]:
    """Empty if it is none: who waits finds out."""
    try:
        return unpack_map(data, ANSWER)
    except DecodeError:
        return {}


def _is_of_a_copy(reply: dict[str, object]) -> bool:
    detail = reply.get("detail")
    if not isinstance(detail, dict):
        return False
    path = cast("dict[str, object]", detail).get("path")
    return (reply.get("code"), path) == OF_A_COPY
