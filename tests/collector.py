"""A real OpenTelemetry collector as a process: Rotel, which PyPI has as a wheel with its program.

It takes OTLP by HTTP as any collector does, batches, and forwards by OTLP to `to`.
"""

import contextlib
import importlib.util
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from pathlib import Path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def program() -> str:
    found = importlib.util.find_spec("rotel")
    assert found is not None
    assert found.origin is not None
    return os.path.join(os.path.dirname(found.origin), "rotel-agent")


@contextlib.contextmanager
def collector(to: str) -> Generator[str]:
    """Its base URL, once it listens."""
    http, grpc = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="rotel-") as directory:
        log = Path(directory, "log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [
                    program(),
                    "start",
                    f"--pid-file={directory}/pid",
                    f"--log-file={directory}/agent.log",
                    f"--otlp-http-endpoint=127.0.0.1:{http}",
                    f"--otlp-grpc-endpoint=127.0.0.1:{grpc}",
                    "--exporter=otlp",
                    "--otlp-exporter-protocol=http",
                    f"--otlp-exporter-endpoint={to}",
                ],
                stdout=file,
                stderr=file,
                env={"PATH": os.environ["PATH"]},
            )
        try:
            _wait_listening(http, process, log)
            yield f"http://127.0.0.1:{http}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_listening(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end_s = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end_s, log.read_text()
        time.sleep(0.05)
