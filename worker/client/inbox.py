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
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.trouble = ""
        self.maybe_stored = False
        self.arrived: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()


class Inbox:
    """Hands over replies by command ID; what nobody expects any more is dropped."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._expected: defaultdict[str, list[Expected]] = defaultdict(list)

    @classmethod
    @asynccontextmanager
    async def open(cls, link: Link, subject: str) -> AsyncGenerator["Inbox"]:
        """Subscribe below `subject`."""
        inbox = cls(subject)
        async with link.subscribed(f"{subject}.*", inbox._receive):
            yield inbox

    @contextmanager
    def expect(self, command_id: str) -> Generator[Expected]:
        """Until the end of the block, take the reply to a command."""
        expected = Expected(f"{self._subject}.{command_id}")
        self._expected[command_id].append(expected)
        try:
            yield expected
        finally:
            self._expected[command_id].remove(expected)
            if not self._expected[command_id]:
                del self._expected[command_id]

    def _receive(self, message: Message) -> None:
        if _is_of_a_copy(message.data):
            return
        for expected in self._expected.get(message.subject.rpartition(".")[2], ()):
            if not expected.arrived.done():
                expected.arrived.set_result(message.data)


def _is_of_a_copy(data: bytes) -> bool:
    if OF_A_COPY[1].encode() not in data:
        return False
    try:
        reply = unpack_map(data, ANSWER)
    except DecodeError:
        return False
    detail = reply.get("detail")
    if not isinstance(detail, dict):
        return False
    path = cast("dict[str, object]", detail).get("path")
    return (reply.get("code"), path) == OF_A_COPY
