"""The API client: replies that the real binary does not send on demand, and other versions."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from handlers.errors import Exhausted, Failure, HostFault, Invalid, Unavailable
from handlers.host.vmm.api_client import VmmApi
from handlers.host.vmm.api_schema import boot_requests, refusal
from handlers.host.vmm.http_answers import BODY_BYTES
from handlers.specs import BootConfig, NicConfig

CONFIG = BootConfig(
    vcpus=2,
    mem_mib=128,
    kernel="/vmlinux",
    initrd=None,
    boot_args="reboot=k",
    drives=(),
    nic=NicConfig("tn1i3", "02:fc:00:01:00:03"),
    vsock="/v.sock",
    serial="/serial",
)


def requests_in(data: bytes) -> list[bytes]:
    """Whole requests that were sent at once."""
    found: list[bytes] = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        length = int(head.rpartition(b"Content-Length: ")[2]) if b"Content-Length" in head else 0
        found.append(data[: len(head) + 4 + length])
        data = rest[length:]
    return found


class Server:
    """Gives each request the same bytes and then closes, or keeps the connection open."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reply = b""
        self.keep = False
        self.refuse = b""  # how the request begins that is refused
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                for request in requests_in(data):
                    self.requests.append(request)
                    refused = self.refuse and request.startswith(self.refuse)
                    writer.write(http(b"{}", "400 Bad") if refused else self.reply)
                await writer.drain()
                if not self.keep:
                    break
        except ConnectionError:
            pass
        finally:
            writer.close()


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(tmp_path)
    listening = await asyncio.start_unix_server(made.serve, tmp_path / "api.sock")
    yield made
    listening.close()
    await listening.wait_closed()


def http(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nServer: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def client(server: Server) -> VmmApi:
    return VmmApi(str(server.directory), timeout_s=1, snapshot_timeout_s=1)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"", Unavailable),
        (b"HTTP/1.1 20", Unavailable),
        (b"SSH-2.0-OpenSSH\r\n\r\n", Unavailable),
        (http(b"{}")[:-1], Unavailable),
        (http(b"not json"), HostFault),
        (http(b'{"id": 1}'), HostFault),
        (http(b"[" * 100_000), HostFault),
        (http(b" " * (BODY_BYTES + 1)), HostFault),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000, Unavailable),
        (http(b"oops", "500 Internal"), HostFault),
    ],
    ids=["closed", "cut", "ssh", "short", "text", "type", "deep", "large", "header", "500"],
)
async def test_an_invalid_reply_is_a_failure_and_not_a_bug(
    server: Server, reply: bytes, kind: type[Failure]
) -> None:
    server.reply = reply
    api = client(server)

    with pytest.raises(kind):
        await api.state()

    await api.close()


async def test_after_an_idle_connection_was_closed_one_call_fails_and_the_next_reconnects(
    server: Server,
) -> None:
    server.reply = http(b'{"id": "a", "state": "Paused", "vmm_version": "1.12.1"}')
    api = client(server)
    assert await api.state() == "Paused"

    with pytest.raises(Unavailable):
        await api.state()
    assert await api.state() == "Paused"

    await api.close()


@pytest.mark.parametrize(
    ("said", "version"),
    [("1.12.1", "1.12.1"), ("v1.17.0-dev", "1.17.0"), ("1.12.1" + "x" * 100_000, "1.12.1")],
    ids=["release", "dev", "long"],
)
async def test_the_version_is_no_longer_than_a_version(
    server: Server, said: str, version: str
) -> None:
    server.reply = http(b'{"firecracker_version": "%s"}' % said.encode())
    api = client(server)

    assert await api.version() == version

    await api.close()


async def test_what_is_not_a_version_is_a_host_fault(server: Server) -> None:
    server.reply = http(b'{"firecracker_version": "%s"}' % (b"x" * 100_000))
    api = client(server)

    with pytest.raises(HostFault, match="invalid version of the VMM") as failure:
        await api.version()

    assert len(failure.value.message) < 200
    await api.close()


async def test_no_socket_is_unavailable(tmp_path: Path) -> None:
    api = VmmApi(str(tmp_path), timeout_s=1, snapshot_timeout_s=1)

    with pytest.raises(Unavailable, match="gone"):
        await api.state()


async def test_a_symlink_in_place_of_the_socket_is_not_followed(server: Server) -> None:
    (server.directory / "api.sock").rename(server.directory / "elsewhere")
    (server.directory / "api.sock").symlink_to("elsewhere")

    with pytest.raises(HostFault, match="not a socket"):
        await client(server).state()

    assert server.requests == []


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Resource busy (os error 16)", Unavailable),
        ("Device or resource busy (os error 16)", Unavailable),
        ("No space left on device (os error 28)", Exhausted),
        ("Cannot allocate memory (os error 12)", Exhausted),
        ("Too many open files (os error 24)", Exhausted),
        ("Operation not permitted (os error 1)", HostFault),
        ("No such file or directory (os error 2)", HostFault),
        ("Resource busy", HostFault),
        ("os error 16", HostFault),
    ],
)
def test_the_errno_decides_the_class_and_never_the_text(words: str, kind: type[Failure]) -> None:
    body = json.dumps({"fault_message": f"Some error: {words}"}).encode()

    failure = refusal("PUT", "/x", 400, body)

    assert type(failure) is kind
    assert words in failure.message


@given(st.binary(max_size=3000))
def test_a_quoted_refusal_is_bounded(body: bytes) -> None:
    failure = refusal("PUT", "/x", 400, body)

    assert len(failure.message) < 500
    assert "\n" not in failure.message


# -- what is sent ----------------------------------------------------------------------------------


def test_a_missing_initrd_is_not_sent() -> None:
    bodies = {path: msgspec.to_builtins(body) for _, path, body in boot_requests(CONFIG)}

    assert bodies["/boot-source"] == {"kernel_image_path": "/vmlinux", "boot_args": "reboot=k"}


async def test_configure_sends_each_version_what_it_accepts(server: Server) -> None:
    paths = {}
    for version in ("1.13.9", "1.14.0"):
        server.requests.clear()
        server.keep = True
        server.reply = http(json.dumps({"firecracker_version": version}).encode())
        api = client(server)

        await api.configure(CONFIG)

        paths[version] = [request.split(b" ")[1].decode() for request in server.requests]
        await api.close()
    assert "/serial" not in paths["1.13.9"]
    assert paths["1.14.0"] == [*paths["1.13.9"], "/serial"]


async def test_a_refused_part_of_the_configuration_is_named_and_the_next_call_reconnects(
    server: Server,
) -> None:
    server.keep, server.refuse = True, b"PUT /boot-source "
    server.reply = http(b'{"id": "a", "state": "Paused", "vmm_version": "1.12.1"}')
    api = client(server)
    assert await api.state() == "Paused"

    with pytest.raises(HostFault) as caught:
        await api.configure(CONFIG)

    assert "PUT /boot-source" in caught.value.message
    assert len(server.requests) > 3  # what follows it was sent, too
    assert await api.state() == "Paused"
    await api.close()


async def test_a_connection_that_ends_within_the_configuration_is_unavailable(
    server: Server,
) -> None:
    server.keep = True
    server.reply = http(b'{"id": "a", "state": "Paused", "vmm_version": "1.12.1"}')
    api = client(server)
    assert await api.state() == "Paused"
    server.reply = http(b"").replace(b"Server: x", b"Connection: close")

    with pytest.raises(Unavailable):
        await api.configure(CONFIG)

    await api.close()


async def test_a_load_is_sent_as_the_version_accepts_it(server: Server) -> None:
    bodies = {}
    for version in ("1.15.9", "1.16.0"):
        server.requests.clear()
        server.keep = True
        server.reply = http(json.dumps({"firecracker_version": version}).encode())
        api = client(server)

        await api.load_snapshot("/s", "/m")

        bodies[version] = json.loads(server.requests[-1].partition(b"\r\n\r\n")[2])
        await api.close()
    assert bodies["1.15.9"] == {
        "snapshot_path": "/s",
        "mem_backend": {"backend_type": "File", "backend_path": "/m"},
        "resume_vm": False,
    }
    assert bodies["1.16.0"] == {**bodies["1.15.9"], "clock_realtime": True}


@pytest.mark.parametrize(
    ("fault", "image"),
    [
        ("Cannot load kernel due to invalid memory configuration or invalid kernel", "vmlinux"),
        ("Error with initrd initialization: Failed to compute the initrd address.", "initrd"),
    ],
)
def test_an_image_that_cannot_be_loaded_is_the_pools_mistake(fault: str, image: str) -> None:
    body = json.dumps({"fault_message": f"Start microvm error: {fault}"}).encode()

    failure = refusal("PUT", "/actions", 400, body)

    assert isinstance(failure, Invalid)
    assert failure.path == image
    assert "mem_mib" in failure.message
