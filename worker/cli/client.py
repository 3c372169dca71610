"""The client as the command line uses it: by settings, with maps, and with the CLI's errors.

For programs there is `worker/client/client.py`, which does all the work here, too.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from schemas.requests import Request
from schemas.settings import Settings
from worker.bus.guarded_client import GuardedClient
from worker.cli.context import CliError, NoAnswer, NoWorker, progress
from worker.client import errors, link
from worker.client.client import HostdClient, new_id
from worker.client.feed import CAPACITY, Buffer, envelope_of
from worker.client.link import ASK_TIMEOUT_S, Kept

__all__ = ["ASK_TIMEOUT_S", "Client", "Kept", "check_credentials", "connect", "new_id"]


class Client:
    """One NATS connection, opened by `connect`. Raises only NoAnswer and CliError.

    Answers are maps, so that what a newer hostd adds is printed, too.
    """

    def __init__(self, client: HostdClient, root: str) -> None:
        self._client = client
        self._link = client.link
        self._root = root

    @property
    def nats(self) -> GuardedClient:
        """nats-py's client of the current connection, for tests and measurements.

        Raises:
            NoAnswer: not connected.
        """
        current = self._link.connection.client
        if current is None:
            raise NoAnswer(f"not connected to NATS: {self._link.connection.last_error}")
        return current

    async def send(
        self,
        host: str,
        request: Request,
        *,
        timeout_s: float,
        command_id: str | None = None,
        deadline_ms: int | None = None,
        issuer: str = "hostd-cli",
        traceparent: str | None = None,
    ) -> dict[str, Any]:
        """Publish one command and return its reply envelope as a map, whatever its code.

        The `command_id` of an earlier command with the same request returns its stored reply.

        Raises:
            CliError: `conflict`: a worker says that it has this `command_id` with another request.
                A worker that runs refuses the command itself, by its reply.
            NoAnswer: there is no reply yet.
        """
        with told():
            try:
                return await self._client.exchange(
                    host,
                    request,
                    timeout_s=timeout_s,
                    command_id=command_id,
                    deadline_ms=deadline_ms,
                    issuer=issuer,
                    traceparent=traceparent,
                )
            except errors.NoReply as error:
                raise NoAnswer(
                    f"no reply from host {host} to command {error.command_id} within "
                    f"{timeout_s:g} s; the command may still run: resend with --id "
                    f"{error.command_id} for its outcome"
                ) from error

    async def ask(
        self, host: str, question: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send a read-only query to a worker.

        Raises:
            CliError: the worker's error.
            NoAnswer: no worker of this host is subscribed, or it did not answer in time.
        """
        with told():
            return await self._client.ask_map(host, question, body or {})

    async def live_events(self, host: str) -> AsyncIterator[dict[str, Any]]:
        """Events from now on, of one host or of all (`*`). Never ends."""
        each = self._live(host)
        await anext(each)  # subscribed
        return each

    async def _live(self, host: str) -> AsyncGenerator[dict[str, Any]]:
        buffer = Buffer(CAPACITY)
        with told():
            subject = f"{self._root}.{host}.evt.>"
            async with self._link.subscribed(subject, buffer.put, buffer.lose):
                yield {}
                while True:
                    message = await buffer.take()
                    if (event := self._event(message.subject, message.data)) is not None:
                        yield event

    async def kept_events(self, stream: str, host: str) -> AsyncIterator[dict[str, Any]]:
        """Retained events of the stream, oldest first, up to now."""
        async for message in self.kept(stream, f"{self._root}.{host}.evt.>"):
            if (event := self._event(message.subject, message.data)) is not None:
                yield event

    def _event(self, subject: str, data: bytes) -> dict[str, Any] | None:
        """None, with a note, for what is no event of the host of its subject."""
        try:
            return envelope_of(self._root, subject, data)
        except errors.BadAnswer as error:
            progress(f"note: left out: {error.message}")
            return None

    async def kept(self, stream: str, subjects: str) -> AsyncIterator[Kept]:
        """Retained messages of these subjects, oldest first, up to now."""
        with told():
            async for message in self._link.kept(stream, subjects):
                yield message

    async def kept_message(self, stream: str, seq: int) -> Kept:
        """One retained message.

        Raises:
            CliError: `not_found`.
        """
        with told():
            return await self._link.kept_message(stream, seq)

    async def delete_kept(self, stream: str, seq: int) -> None:
        """Delete one message of a stream; needs an administrator's credential.

        Raises:
            CliError: `not_found`.
        """
        with told():
            await self._link.delete(stream, seq)

    async def publish_bytes(self, subject: str, payload: bytes, msg_id: str) -> None:
        """Publish bytes as they are to the command stream, under a message ID of their own."""
        with told():
            await self._link.publish(subject, payload, headers={"Nats-Msg-Id": msg_id})


@asynccontextmanager
async def connect(
    settings: Settings, *, url: str | None = None, creds: str | None = None
) -> AsyncGenerator[Client]:
    """Connect as the settings say.

    Raises:
        NoAnswer: the server is unreachable or refused the connection.
        CliError: `invalid` CA file or credentials file.
    """
    opened = HostdClient.connect(
        url or settings.nats.url,
        cell=settings.host.cell,
        root=settings.root,
        creds=creds or settings.nats.creds,
        ca_file=settings.nats.tls,
        js_domain=settings.nats.js_domain,
        inbox_prefix=settings.nats.inbox_prefixes[0].removesuffix("."),
        name="hostd-cli",
        patient=False,
    )
    with told():
        async with opened as client:
            yield Client(client, settings.root)


def check_credentials(path: str) -> None:
    """The credentials file, readable and in one of its two forms.

    Raises:
        CliError: `invalid`; the message names the file.
    """
    with told():
        link.check_credentials(path)


@contextmanager
def told() -> Generator[None]:
    """Raises the client's errors as the command line's."""
    try:
        yield
    except errors.NoWorker as error:
        raise NoWorker(error.message) from error
    except errors.NoAnswer as error:
        raise NoAnswer(error.message) from error
    except errors.HostdError as error:
        raise CliError(error.code, error.message) from error
