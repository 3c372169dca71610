"""The API of one live VMM: HTTP on the socket in its jail, a request at a time.

Firecracker also serves one request at a time: while it writes a snapshot it answers nothing else,
so a missing reply does not prove that the VMM is dead; only its pidfd does.
"""

import asyncio
import socket
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from handlers.errors import HostFault, Unavailable, of_os_error
from handlers.host.jail.sockets import connect
from handlers.host.vmm.api_schema import (
    Action,
    Body,
    InstanceInfo,
    SnapshotCreate,
    VersionInfo,
    VmState,
    boot_requests,
    for_version,
    is_versioned,
    load_request,
    refusal,
)
from handlers.host.vmm.http_answers import Answer, Answers, NotAnAnswer
from handlers.host.vmm.versions import parse_version, text_of
from handlers.jail_names import API_SOCKET
from handlers.specs import BootConfig

READ_BYTES = 65_536

Message = tuple[str, str, bytes]  # method, path, body
T = TypeVar("T")


class VmmApi:
    """The API of the VMM in one jail. Connects on the first call and keeps the connection.

    Every call raises:
        Conflict: the VMM is in a state that does not allow it (e.g. already started).
        Unavailable: not listening, gone during the call, no reply in time, a busy device.
        Exhausted: out of disk, memory or descriptors.
        HostFault: refused for any other reason; the message quotes Firecracker's.

    Source: src/firecracker/swagger/firecracker.yaml of Firecracker.
    """

    def __init__(self, root: str, *, timeout_s: float, snapshot_timeout_s: float) -> None:
        self._root = root
        self._timeout_s = timeout_s
        self._snapshot_timeout_s = snapshot_timeout_s
        self._one_at_a_time = asyncio.Lock()
        self._socket: socket.socket | None = None
        self._answers = Answers()
        self._version: str | None = None

    async def configure(self, config: BootConfig) -> None:
        """All that precedes the start, sent at once: the VMM answers one request after the other.

        It executes those behind a refused one, too: it is not to be started then.
        """
        requests = [
            (method, path, msgspec.json.encode(accepted))
            for method, path, body in boot_requests(config)
            if (accepted := await self._accepted(body)) is not None
        ]
        await self._call_all(requests, self._timeout_s)

    async def start(self) -> None:
        await self._send("PUT", "/actions", Action("InstanceStart"))

    async def pause(self) -> None:
        await self._send("PATCH", "/vm", VmState("Paused"))

    async def resume(self) -> None:
        await self._send("PATCH", "/vm", VmState("Resumed"))

    async def state(self) -> str:
        return (await self.info()).state

    async def info(self) -> InstanceInfo:
        """ID, state and version in one reply."""
        info = await self._read("/", InstanceInfo)
        self._version = info.vmm_version
        return info

    async def version(self) -> str:
        """E.g. `1.12.1`. Read once: it does not change while the VMM lives.

        Raises:
            HostFault: also if what the VMM says is not a version.
        """
        if self._version is None:
            self._version = (await self._read("/version", VersionInfo)).firecracker_version
        return text_of(parse_version(self._version))

    async def create_snapshot(self, state_path: str, mem_path: str) -> None:
        body = SnapshotCreate("Full", state_path, mem_path)
        await self._send("PUT", "/snapshot/create", body, timeout_s=self._snapshot_timeout_s)

    async def load_snapshot(self, state_path: str, mem_path: str) -> None:
        """The VM is paused afterwards. After a failure the VMM has exited or is about to."""
        method, path, body = load_request(state_path, mem_path)
        await self._send(method, path, body, timeout_s=self._snapshot_timeout_s)

    async def send_ctrl_alt_del(self) -> None:
        await self._send("PUT", "/actions", Action("SendCtrlAltDel"))

    async def close(self) -> None:
        self._drop()

    # -- one request ---------------------------------------------------------------------------

    async def _read(self, path: str, kind: type[T]) -> T:
        body = await self._call("GET", path, b"", self._timeout_s)
        try:
            return msgspec.json.decode(body, type=kind)
        except (ValueError, RecursionError) as error:
            raise HostFault(f"invalid reply to GET {path} from the VMM's API: {error}") from error

    async def _send(
        self, method: str, path: str, body: Body, *, timeout_s: float | None = None
    ) -> None:
        """Send a request with a body; what the VMM's version does not accept is left out."""
        if (accepted := await self._accepted(body)) is not None:
            data = msgspec.json.encode(accepted)
            await self._call(method, path, data, timeout_s or self._timeout_s)

    async def _accepted(self, body: Body) -> Body | None:
        if not is_versioned(body):
            return body
        return for_version(body, parse_version(await self.version()))

    async def _call(self, method: str, path: str, body: bytes, timeout_s: float) -> bytes:
        """One request and its reply."""
        return await self._call_all([(method, path, body)], timeout_s)

    async def _call_all(self, requests: Sequence[Message], timeout_s: float) -> bytes:
        """Send the requests, read their replies up to the first refusal; the body of the last.

        Calls that do not all complete close the connection.
        """
        method, path, _ = requests[0]
        answer = Answer(status=0, body=b"", keeps=True)
        async with self._one_at_a_time:
            done = False
            try:
                async with asyncio.timeout(timeout_s):
                    connection = await self._put(requests)
                    for method, path, _ in requests:  # noqa: B007 - failures name them
                        answer = await self._receive(connection, answer)
                        if answer.status >= 300:
                            break
                done = answer.keeps and path == requests[-1][1]
            except TimeoutError as error:
                raise Unavailable(
                    f"Firecracker did not answer {method} {path} within {timeout_s:g} s"
                ) from error
            except (FileNotFoundError, ConnectionError, NotAnAnswer) as error:
                raise Unavailable(
                    f"the VMM's API is gone, at {method} {path}: {type(error).__name__}"
                ) from error
            except OSError as error:
                raise of_os_error(
                    error, f"cannot reach the VMM's API for {method} {path}"
                ) from error
            finally:
                if not done:
                    self._drop()
        if answer.status >= 300:
            raise refusal(method, path, answer.status, answer.body)
        return answer.body

    async def _put(self, requests: Sequence[Message]) -> socket.socket:
        if self._socket is None:
            self._socket = connect(self._root, API_SOCKET)
            self._answers = Answers()
        if self._answers.pending:
            raise NotAnAnswer("bytes came before the request")
        message = b"".join(_encoded(*each) for each in requests)
        await asyncio.get_running_loop().sock_sendall(self._socket, message)
        return self._socket

    async def _receive(self, connection: socket.socket, before: Answer) -> Answer:
        if not before.keeps:
            raise ConnectionResetError("closed after the reply before")
        while (answer := self._answers.next()) is None:
            data = await asyncio.get_running_loop().sock_recv(connection, READ_BYTES)
            if not data:
                raise ConnectionResetError("closed before the reply")
            self._answers.feed(data)
        return answer

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _encoded(method: str, path: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body
