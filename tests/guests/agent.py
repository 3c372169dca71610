"""A plain client of the guest agent, for tests: framed JSON over Firecracker's vsock socket.

Not hostd's client (`handlers/host/vmm/guest_agent.py`), on purpose: a test must not trust the code
that it proves. Written from the same specification, synchronous and with the standard library only,
so that it also runs where hostd is not installed.
"""

import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

AGENT_PORT = 5252


def connect(uds: Path, port: int = AGENT_PORT, timeout_s: float = 2.0) -> socket.socket:
    """A stream to the guest's port.

    Raises:
        OSError: no VMM, or nothing listens in the guest (EOF instead of `OK`), or no answer.
    """
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(timeout_s)
    directory = os.open(uds.parent, os.O_PATH)  # a path through it has no length limit
    try:
        stream.connect(f"/proc/self/fd/{directory}/{uds.name}")
        stream.sendall(b"CONNECT %d\n" % port)
        hello = b""
        while not hello.endswith(b"\n"):
            hello += _read(stream, 1)
    except BaseException:
        stream.close()
        raise
    finally:
        os.close(directory)
    return stream


def send(stream: socket.socket, request: Any) -> None:
    body = json.dumps(request).encode()
    stream.sendall(struct.pack(">I", len(body)) + body)


def receive(stream: socket.socket) -> Any:
    (size,) = struct.unpack(">I", _read(stream, 4))
    return json.loads(_read(stream, size))


def ask(uds: Path, request: Any, *, port: int = AGENT_PORT, timeout_s: float = 2.0) -> Any:
    """One request on a connection of its own."""
    with connect(uds, port, timeout_s) as stream:
        send(stream, request)
        return receive(stream)


def ask_until_answered(uds: Path, request: Any, *, within_s: float = 10.0) -> Any:
    """Ask anew until the guest answers: it may still boot, or cut a first connection after a load.

    Raises:
        OSError: the last failure, when the time is up.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            return ask(uds, request, timeout_s=min(1.0, within_s))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)


def _read(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = stream.recv(size - len(data))
        if not part:
            raise ConnectionResetError(f"the guest closed after {len(data)} of {size} bytes")
        data += part
    return data
