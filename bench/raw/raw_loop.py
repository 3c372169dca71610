"""The raw loop that hostd's own cost per command is measured against: pull, reply, ack.

As a program: `raw_loop.py <url> <stream> <consumer>`. No journal, no checks, no lanes: it reads
`reply_to`, sends a reply of the usual size there, acknowledges without waiting, and never exits.
"""

# pyright: reportUnknownMemberType=false
# (nats-py leaves some of its parameters without types)

import asyncio
import json
import sys
from typing import Any

import msgpack
import nats

from tests.plain import unpacked

BATCH = 1000
EXPIRES_NS = 60_000_000_000
REPLY = msgpack.packb(
    {
        "v": 1,
        "id": "0" * 36,
        "host_id": "h" * 12,
        "response": "Ok",
        "code": "ok",
        "retryable": False,
        "changed": False,
        "status": "stopped",
        "attempts": 1,
        "replayed": False,
        "received_at_ms": 1 << 40,
        "finished_at_ms": 1 << 40,
        "steps": [],
        "left_behind": [],
        "supported": [],
        "detail": {},
    }
)


async def main(url: str, stream: str, consumer: str) -> None:
    connection = await nats.connect(url)
    inbox = connection.new_inbox()
    owed = 0

    async def ask() -> None:
        nonlocal owed
        owed = BATCH
        body = json.dumps({"batch": BATCH, "expires": EXPIRES_NS}).encode()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        await connection.publish(subject, body, reply=inbox)

    async def on_message(message: Any) -> None:
        nonlocal owed
        if not message.reply:  # a status: the pull expired
            await ask()
            return
        await connection.publish(unpacked(message.data)["reply_to"], REPLY)
        await connection.publish(message.reply, b"+ACK")
        owed -= 1
        if owed == 0:
            await ask()

    await connection.subscribe(inbox, cb=on_message)
    await ask()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
