"""Checks that the cell has the streams, consumer and bucket that the worker needs.

Only reads, with the worker's own credentials; `provision.py` creates and changes.
"""

import json
from dataclasses import dataclass
from typing import Any

from schemas.subjects import Subjects
from worker.bus import accounts, api_reply, imports, streams
from worker.bus.connection import Connection
from worker.bus.message import NoResponder
from worker.bus.protocol import BusError, NotProvisioned

NOT_FOUND = (10014, 10059)


@dataclass(frozen=True, slots=True)
class StreamFound:
    """The last sequence number, the size, and its bound (-1: none)."""

    last_seq: int
    size_bytes: int
    max_bytes: int


async def verify(
    connection: Connection, subjects: Subjects, js_domain: str = ""
) -> dict[str, StreamFound]:
    """Check streams, consumer and bucket, and with accounts what this host's account imports.

    Returns:
        What each stream has, by name.

    Raises:
        NotProvisioned: what is missing or wrong, and what to run.
        BusError: no answer now; try again.
    """
    api = streams.js_api(js_domain)
    if js_domain:
        await _check_imports(connection, subjects, js_domain)
    wrong: list[str] = []
    streams_found: dict[str, StreamFound] = {}
    for config in streams.stream_configs(subjects):
        name = str(config["name"])
        found = await _info(connection, f"{api}STREAM.INFO.{name}", f"stream {name}")
        if found is None:
            wrong.append(f"stream {name} is missing")
            continue
        state = api_reply.member(found, "state", f"stream {name}")
        streams_found[name] = StreamFound(
            last_seq=api_reply.sequence_of(state, "last_seq", f"stream {name}"),
            size_bytes=api_reply.sequence_of(state, "bytes", f"stream {name}"),
            max_bytes=api_reply.limit_of(found["config"], "max_bytes", f"stream {name}"),
        )
        ignored = streams.STREAM_NEUTRAL | streams.STREAM_TUNABLE
        different = streams.differences(config, found["config"], ignored)
        wrong += [f"stream {name}: {text}" for text in different]
    stream, consumer = subjects.commands_stream, subjects.consumer
    what = f"consumer {consumer} of {stream}"
    found = await _info(connection, f"{api}CONSUMER.INFO.{stream}.{consumer}", what)
    if found is None:
        wrong.append(f"{what} is missing")
    else:
        ignored = streams.NEUTRAL | streams.CONSUMER_TUNABLE
        config = streams.consumer_config(subjects)
        different = streams.differences(config, streams.consumer_found(found), ignored)
        wrong += [f"{what}: {text}" for text in different]
    if wrong:
        raise NotProvisioned(
            f"{'; '.join(wrong)}. Run `hostd provision` with an admin's credentials"
            f" for cell {subjects.cell} and host {subjects.host_id}"
        )
    return streams_found


async def count_dead(connection: Connection, subjects: Subjects, js_domain: str = "") -> int:
    """How many dead letters of this host the stream keeps; the first 100,000 lanes count.

    By the right that `verify` needs, too.

    Raises:
        BusError: no answer now, or one that no server gives.
    """
    what = f"stream {subjects.dead_stream}"
    endpoint = f"{streams.js_api(js_domain)}STREAM.INFO.{subjects.dead_stream}"
    own = f"{subjects.root}.{subjects.host_id}.dead.>"
    query = json.dumps({"subjects_filter": own}).encode()
    found = await _info(connection, endpoint, what, query)
    if found is None:
        raise BusError(f"{what} is missing")
    state = api_reply.member(found, "state", what)
    if state.get("subjects") is None:  # left out if there are none
        return 0
    counts = api_reply.member(state, "subjects", what)
    return sum(api_reply.sequence_of(counts, subject, what) for subject in counts)


async def _check_imports(connection: Connection, subjects: Subjects, js_domain: str) -> None:
    account = accounts.host_account(subjects.host_id)
    lacking = await imports.missing(connection, account, subjects, [subjects.host_id], js_domain)
    if lacking:
        raise NotProvisioned(
            f"the NATS server's configuration is incomplete: {'; '.join(lacking)}. Add what"
            f" `hostd provision --server-config` prints, and reload the server; [nats] js_domain is"
            f" {js_domain!r}"
        )


async def _info(
    connection: Connection, endpoint: str, what: str, query: bytes = b""
) -> dict[str, Any] | None:
    """The description of a stream or consumer; None if it does not exist."""
    try:
        answer = await connection.request(endpoint, query)
    except NoResponder as error:
        raise NotProvisioned(
            f"cannot read {what}: nothing answers {endpoint}. Enable JetStream for this NATS"
            " account, or use the accounts of deploy/nats/hostd.conf and set [nats] js_domain"
        ) from error
    except BusError as error:
        raise BusError(
            f"cannot read {what}: {error} (JetStream not ready, or no permission for {endpoint})"
        ) from error
    found = api_reply.read_reply(answer.data, f"reply to {endpoint}")
    if "error" in found:
        if found["error"].get("err_code") in NOT_FOUND:
            return None
        raise BusError(f"{what}: {found['error'].get('description')}")
    api_reply.member(found, "config", f"reply to {endpoint}")
    return found
