"""nats-py's client that trusts neither the network nor what messages contain.

- With TLS required, it sends no CONNECT, hence no credential, on a connection without TLS, whatever
  the server's INFO says: INFO arrives in clear text, and anybody on the way can rewrite it.
- It connects only to the servers that it was given. INFO also names others (`connect_urls`);
  nats-py would sign in to these as well.
- A message that nats-py cannot parse is passed on like any other (`wire.py`).

The worker's client (`guarded_client.py`) and that of the command line are both this one.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# pyright: reportMissingTypeArgument=false, reportPrivateUsage=false

import asyncio
from collections.abc import Sequence
from typing import Any

from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.protocol.parser import Parser

from worker.bus.wire import WireParser, read_headers


def requires_tls(urls: Sequence[str], ca_file: str) -> bool:
    """Whether the settings ask for TLS: a CA file, or `tls://` for at least one server."""
    return bool(ca_file) or any(url.strip().startswith(("tls://", "wss://")) for url in urls)


class StrictClient(Client):
    """A client that connects as its settings say or not at all.

    Args:
        tls: send CONNECT only over TLS.
        own_parser: false leaves nats-py's parser in place, for the tests that show its defects.
    """

    def __init__(self, *, tls: bool, own_parser: bool = True) -> None:
        super().__init__()
        self._tls_required = tls
        self._own_parser = own_parser
        if own_parser:
            self._ps: Parser | WireParser = WireParser(self)  # type: ignore[assignment]

    @property
    def is_clustered(self) -> bool:
        """Whether the server says that it belongs to a cluster."""
        return bool(self._server_info.get("cluster"))

    def _connect_command(self) -> bytes:
        if self._tls_required and not self._encrypted():
            raise errors.Error(
                "the server did not offer TLS, which the settings require ([nats] tls or a tls://"
                " URL): no credential was sent; configure TLS on the server, or look for who"
                " rewrites its INFO"
            )
        return super()._connect_command()

    def take(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> bool:
        """Called by the parser for each message; false leaves it to `_process_msg`."""
        del sid, subject, reply, data, headers
        return False

    async def drop(self) -> None:
        """Close the socket of an attempt to connect that failed; upstream leaves it open."""
        writer: Any = getattr(self._transport, "_bare_io_writer", None)
        if writer is not None:
            writer.transport.abort()
            await asyncio.sleep(0)  # the transport closes its socket in the next turn of the loop

    def _encrypted(self) -> bool:
        transport: Any = self._transport
        writer = getattr(transport, "_io_writer", None)
        if writer is not None:
            return writer.get_extra_info("ssl_object") is not None
        return bool(getattr(transport, "_using_tls", False))  # a WebSocket

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # Upstream keeps the first max_payload, although a reload of the server changes it.
        limit = info.get("max_payload")
        if isinstance(limit, int) and limit > 0:
            self._max_payload = limit
        own = {name: value for name, value in info.items() if name != "connect_urls"}
        await super()._process_info(own, initial_connection)

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        if not self._own_parser:
            return await super()._process_headers(headers)
        return read_headers(headers) if headers else None

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        if not self._own_parser:
            upstream: Msg = super()._build_message(sid, subject, reply, data, headers)
            return upstream
        message: Msg = self.msg_class(
            # U+FFFD is in no subject of hostd: the message is refused as any other that is invalid.
            subject=subject.decode(errors="replace"),
            reply=reply.decode(errors="replace"),
            data=data,
            headers=headers,
            _client=self,
            _sid=sid,
        )
        return message
