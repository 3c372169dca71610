"""The parser of Firecracker's answers: total, bounded, and of one mind with h11."""

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.errors import HostFault
from handlers.host.vmm.http_answers import BODY_BYTES, HEAD_BYTES, Answer, Answers, NotAnAnswer

NO_BODY = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
LETTERS = "!#$%&'*+-.^_`|~0123456789ABCXYZabcxyz"
TOKENS = st.text(LETTERS, min_size=1, max_size=12)
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=30)
FRAMING = {"content-length", "transfer-encoding", "connection"}


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Valid answers of the kinds that Firecracker sends."""
    status = draw(st.sampled_from((200, 204, 400, 404, 413, 500)))
    version = draw(st.sampled_from(("1.0", "1.1")))
    body = b"" if status == 204 else draw(st.binary(max_size=60))
    pairs = draw(st.lists(st.tuples(TOKENS, VALUES), max_size=5))
    headers = [(name, value) for name, value in pairs if name.lower() not in FRAMING]
    if status != 204:
        name = draw(st.sampled_from(("Content-Length", "content-length", "CONTENT-LENGTH")))
        headers.insert(draw(st.integers(0, len(headers))), (name, str(len(body))))
    if draw(st.booleans()):
        headers.append(("Connection", draw(st.sampled_from(("close", "keep-alive", "Close")))))
    lines = [f"HTTP/{version} {status} {draw(VALUES)}", *(f"{n}: {v}" for n, v in headers)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def by_h11(data: bytes) -> Answer:
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method="GET", target="/", headers=[("Host", "localhost")]))
    http.send(h11.EndOfMessage())
    http.receive_data(data)
    status, body = 0, b""
    while not isinstance(event := http.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Response):
            status = event.status_code
        else:
            assert isinstance(event, h11.Data)
            body += bytes(event.data)
    return Answer(status, body, http.their_state is h11.DONE)


def fed(*parts: bytes) -> Answers:
    found = Answers()
    for part in parts:
        found.feed(part)
    return found


@given(answers())
def test_a_valid_answer_is_read_as_h11_reads_it(data: bytes) -> None:
    found = fed(data)

    assert found.next() == by_h11(data)
    assert not found.pending


@given(st.lists(answers(), min_size=1, max_size=4), st.data())
def test_answers_come_in_order_however_the_bytes_are_cut(
    all_: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(all_)
    found = Answers()
    read: list[Answer] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found.feed(stream[:size])
        stream = stream[size:]
        while (answer := found.next()) is not None:
            read.append(answer)

    assert read == [by_h11(each) for each in all_]


@given(
    st.binary(max_size=400)
    | st.tuples(answers(), st.integers(0, 200), st.binary(max_size=3)).map(
        lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] + 1 :]
    )
)
def test_any_bytes_are_an_answer_or_not_and_what_is_accepted_h11_accepts_too(data: bytes) -> None:
    try:
        answer = fed(data).next()
    except (NotAnAnswer, HostFault):
        return
    if answer is not None:
        end = data.index(b"\r\n\r\n") + 4 + len(answer.body)
        assert answer == by_h11(data[:end])


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 100 Continue",
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n folded: x",
        b"HTTP/1.1 200 OK\r\nContent-Length : 0",
        b"HTTP/1.1 200 OK\nContent-Length: 0",
        b"HTTP/1.1 200 OK\r\nX: \xff\r\nContent-Length: 0",
    ],
)
def test_what_firecracker_never_sends_is_no_answer(head: bytes) -> None:
    with pytest.raises(NotAnAnswer):
        fed(head + b"\r\n\r\n").next()


def test_an_answer_without_content_has_no_body() -> None:
    assert fed(NO_BODY).next() == Answer(204, b"", keeps=True)


def test_headers_without_an_end_are_refused_at_their_bound() -> None:
    head = b"HTTP/1.1 200 OK\r\nX: ".ljust(HEAD_BYTES, b"x")

    assert fed(head[:-1]).next() is None
    with pytest.raises(NotAnAnswer):
        fed(head).next()


def test_a_body_is_refused_by_its_length_before_it_is_read() -> None:
    with pytest.raises(HostFault, match="larger"):
        fed(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES + 1)).next()
