"""The bare script that a launch is measured against: jailer, Firecracker's API, guest agent.

The same calls with the same binaries and files as hostd's, and nothing else: no journal, no bus, no
checks, plain blocking sockets. Standard library only. As a program it reads one job per line (JSON)
from stdin and writes one line for each: its duration, or its error.
"""

import json
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.0005
LIMIT_S = 30.0


def launch(job: dict[str, Any]) -> None:
    """Run the jailer, wait for the API, make the calls, wait for the agent's answers."""
    root = Path(job["root"])
    if job["jailer"]:
        _run_jailer(job["jailer"])
    api = _connected(root / "api.sock")
    with api:
        for method, path, body in job["calls"]:
            _call(api, method, path, body)
    for request in job["agent"]:
        _ask(root / "v.sock", request)


def _run_jailer(argv: list[str]) -> None:
    pid = os.posix_spawn(argv[0], argv, {})
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"jailer exited with wait status {status}")


def _connected(path: Path) -> socket.socket:
    until = time.monotonic() + LIMIT_S
    directory = os.open(path.parent, os.O_PATH)  # a path through it has no length limit
    try:
        while True:
            stream = socket.socket(socket.AF_UNIX)
            stream.settimeout(LIMIT_S)
            try:
                stream.connect(f"/proc/self/fd/{directory}/{path.name}")
            except OSError:
                stream.close()
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_S)
            else:
                return stream
    finally:
        os.close(directory)


def _call(api: socket.socket, method: str, path: str, body: object) -> None:
    data = json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    api.sendall(head.encode() + data)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += api.recv(65536) or _closed()
    if not answer.startswith((b"HTTP/1.1 204", b"HTTP/1.1 200")):
        raise RuntimeError(f"{method} {path}: {answer.decode(errors='replace')}")


def _ask(path: Path, request: object) -> None:
    """Retry until the guest answers; while it boots, connections are closed."""
    until = time.monotonic() + LIMIT_S
    body = json.dumps(request).encode()
    while True:
        try:
            with _connected(path) as stream:
                stream.settimeout(0.25)
                stream.sendall(b"CONNECT 5252\n")
                while _exactly(stream, 1) != b"\n":
                    pass
                stream.sendall(struct.pack(">I", len(body)) + body)
                (size,) = struct.unpack(">I", _exactly(stream, 4))
                _exactly(stream, size)
                return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(POLL_S)


def _exactly(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += stream.recv(size - len(data)) or _closed()
    return data


def _closed() -> bytes:
    raise ConnectionResetError("closed")


def main() -> None:
    """One job per line; `at` in the answer is CLOCK_MONOTONIC, common to all processes."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began = time.monotonic()
        try:
            launch(json.loads(line))
            answer: dict[str, object] = {"took_s": time.monotonic() - began, "at": time.monotonic()}
        except (OSError, RuntimeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
