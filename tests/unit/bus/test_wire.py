"""The parser of what a NATS server sends: every message that the server can send is passed on."""

from typing import Any

import pytest
from nats import errors

from worker.bus.wire import LINE_MAX, WireParser, read_headers

Read = tuple[object, ...]


class Recorder:
    def __init__(self) -> None:
        self.read: list[Read] = []
        self.taken = True

    def take(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> bool:
        """Every other message is handed over here, as a client does that has a listener for it."""
        self.taken = not self.taken
        if self.taken:
            self.read.append(("msg", sid, subject, reply, data, headers))
        return self.taken

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        self.read.append(("msg", sid, subject, reply, data, headers))

    async def _process_err(self, err_msg: str) -> None:
        self.read.append(("err", err_msg))

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.read.append(("info", info))

    async def _process_ping(self) -> None:
        self.read.append(("ping",))

    async def _process_pong(self) -> None:
        self.read.append(("pong",))


async def read_in(data: bytes, size: int) -> list[Read]:
    """What is read of these bytes when they arrive `size` at a time."""
    recorder = Recorder()
    parser = WireParser(recorder)
    for at in range(0, len(data), size):
        await parser.parse(data[at : at + size])
    return recorder.read


LONG = b"a" * 9000
CASES: dict[str, tuple[bytes, Read]] = {
    "plain": (b"MSG a.b 7 2\r\nhi\r\n", ("msg", 7, b"a.b", b"", b"hi", b"")),
    "reply": (b"MSG a.b 7 _INBOX.1 2\r\nhi\r\n", ("msg", 7, b"a.b", b"_INBOX.1", b"hi", b"")),
    "empty": (b"MSG a 1 0\r\n\r\n", ("msg", 1, b"a", b"", b"", b"")),
    "not UTF-8": (b"MSG a.\xff\xfe 7 2\r\nhi\r\n", ("msg", 7, b"a.\xff\xfe", b"", b"hi", b"")),
    "VT": (b"MSG a.\x0b9 7 2\r\nhi\r\n", ("msg", 7, b"a.\x0b9", b"", b"hi", b"")),
    "FF": (b"MSG a.\x0c9 7 r 2\r\nhi\r\n", ("msg", 7, b"a.\x0c9", b"r", b"hi", b"")),
    "reply with VT": (b"MSG a 7 r\x0b8 2\r\nhi\r\n", ("msg", 7, b"a", b"r\x0b8", b"hi", b"")),
    "NEL and NUL": (b"MSG a\x85\x00 7 0\r\n\r\n", ("msg", 7, b"a\x85\x00", b"", b"", b"")),
    "long line": (b"MSG " + LONG + b" 7 0\r\n\r\n", ("msg", 7, LONG, b"", b"", b"")),
    "8 bytes of headers": (
        b"HMSG a 7 8 10\r\nNATS/1.0hi\r\n", ("msg", 7, b"a", b"", b"hi", b"NATS/1.0"),
    ),
    "no bytes of headers": (b"HMSG a 7 0 2\r\nhi\r\n", ("msg", 7, b"a", b"", b"hi", b"")),
    "a body that is protocol": (
        b"MSG a 7 8\r\nPING\r\n\r\n\r\n", ("msg", 7, b"a", b"", b"PING\r\n\r\n", b""),
    ),
    "-ERR": (b"-ERR 'Slow Consumer'\r\n", ("err", "'slow consumer'")),
    "-ERR alone": (b"-ERR \r\n", ("err", "")),
    "-ERR not UTF-8": (b"-ERR '\xff'\r\n", ("err", "'�'")),
    "INFO": (b'INFO {"a":1} \r\n', ("info", {"a": 1})),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 100_000])
@pytest.mark.parametrize("name", CASES)
async def test_each_message_is_passed_on_and_the_next_line_is_read(name: str, size: int) -> None:
    data, expected = CASES[name]

    read = await read_in(data + b"+OK\r\nPONG\r\n" + data + b"PING\r\n", size)

    assert read == [expected, ("pong",), expected, ("ping",)]


@pytest.mark.parametrize(
    "data",
    [
        b"HELLO\r\n",
        b"MSG a\r\n",
        b"MSG a x 2\r\n",
        b"MSG a 1 -2\r\n",
        b"MSG a 1 2 3 4 5\r\n",
        b"MSG a 1 99999999999999999999\r\n",
        b"HMSG a 1 9 8\r\n",
        b"INFO {\r\n",
        b"INFO 7\r\n",
        b"INFO " + b"[" * 100_000 + b"\r\n",
        b"x" * (LINE_MAX + 1),
    ],
)
async def test_what_is_not_the_protocol_ends_the_connection(data: bytes) -> None:
    with pytest.raises(errors.ProtocolError):
        await read_in(data, 100_000_000)


async def test_a_reset_forgets_the_old_connection() -> None:
    recorder = Recorder()
    parser = WireParser(recorder)
    await parser.parse(b"MSG a 1 100\r\nhalf")
    parser.reset()
    await parser.parse(b"PING\r\n")

    assert recorder.read == [("ping",)]


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        (b"NATS/1.0", None),
        (b"NATS/1.0\r\n\r\n", None),
        (b"NATS/1.0\r\nA: b\r\nC:d\r\n\r\n", {"A": "b", "C": "d"}),
        (b"NATS/1.0\r\nA: \xff\r\n\r\n", {"A": "�"}),
        (b"NATS/1.0\r\nno colon\r\n: no name\r\na b: c\r\n\xff: x\r\nE:\r\n\r\n", {"E": ""}),
        (b"NATS/1.0 503\r\n\r\n", {"Status": "503"}),
        (b"NATS/1.0 404 No Messages\r\n\r\n", {"Status": "404", "Description": "No Messages"}),
        (
            b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Stream: 9\r\n\r\n",
            {"Status": "100", "Description": "Idle Heartbeat", "Nats-Last-Stream": "9"},
        ),
        (b"NATS/1.0 \xff\xff", None),
        (b"NATS/1.0 408 \xff\r\n\r\n", {"Status": "408", "Description": "�"}),
        (b"\r\n\r\n", None),
        (b"x" * 12, None),
    ],
)
def test_headers_of_any_bytes_are_read(block: bytes, headers: dict[str, str] | None) -> None:
    assert read_headers(block) == headers
