"""Deletion markers are removed from the bucket, and nothing else; old servers, too."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.broker.server import (
    HOST,
    OLD_SERVER,
    SUBJECTS,
    Host,
    Server,
    connection_to,
    consuming_host,
    running_server,
)
from worker.bus import compact as module
from worker.bus import streams
from worker.bus.compact import Compacted, compact
from worker.bus.message import Message
from worker.bus.protocol import BusError, NotProvisioned
from worker.cli.main import main

STREAM = streams.bucket_stream(SUBJECTS)


def later() -> datetime:
    return datetime.now(UTC) + timedelta(hours=2)


async def messages(host: Host) -> int:
    answer = await host.admin.request(f"$JS.API.STREAM.INFO.{STREAM}", b"")
    found: int = json.loads(answer.data)["state"]["messages"]
    return found


async def put(host: Host, *names: str) -> None:
    for name in names:
        await host.bus.write_state(f"{HOST}.{name}", name.encode(), revision=0)


async def delete(host: Host, *names: str) -> None:
    for name in names:
        await host.bus.delete_state(f"{HOST}.{name}", revision=None)


@asynccontextmanager
async def host_of(directory: Path, program: str = "") -> AsyncGenerator[Host]:
    async with running_server(directory, program=program) as server, consuming_host(server) as host:
        yield host


@pytest.mark.parametrize("program", ["", str(OLD_SERVER)], ids=["newest", "oldest"])
async def test_old_markers_go_and_values_and_new_markers_stay(tmp_path: Path, program: str) -> None:
    async with host_of(tmp_path / "nats", program) as host:
        await put(host, "a", "b", "c", "d")
        await delete(host, "a", "c")

        now = await compact(host.admin, SUBJECTS)
        seen = await compact(host.admin, SUBJECTS, dry_run=True, now=later())
        before = await messages(host)
        done = await compact(host.admin, SUBJECTS, now=later())
        again = await compact(host.admin, SUBJECTS, now=later())

        assert now == Compacted(old=0, kept=2)
        assert seen == Compacted(old=2, kept=0)
        assert (before, await messages(host)) == (4, 2)
        assert done == Compacted(old=2, kept=0)
        assert again == Compacted(old=0, kept=0)
        assert [await host.bus.read_state(f"{HOST}.{name}") is None for name in "abcd"] == [
            True,
            False,
            True,
            False,
        ]
        await put(host, "a")  # as an instance of that name that is started again
        await delete(host, "a")
        assert await host.bus.read_state(f"{HOST}.a") is None


@dataclass
class Racing:
    """A connection on which a value comes after its marker was seen, before the purge."""

    host: Host

    async def request(self, subject: str, payload: bytes) -> Message:
        if ".STREAM.PURGE." in subject:
            await put(self.host, "a")
        return await self.host.admin.request(subject, payload)


async def test_a_value_that_comes_after_the_marker_stays(server: Server) -> None:
    async with consuming_host(server) as host:
        await put(host, "a")
        await delete(host, "a")

        done = await compact(Racing(host), SUBJECTS, now=later())

        assert done.old == 1
        found = await host.bus.read_state(f"{HOST}.a")
        assert found is not None
        assert found[0] == b"a"


async def test_without_a_bucket_it_says_so(server: Server) -> None:
    async with connection_to(server.url) as admin:
        with pytest.raises(NotProvisioned, match="no bucket"):
            await compact(admin, SUBJECTS)


async def test_a_marker_that_cannot_be_removed_is_named(server: Server) -> None:
    async with consuming_host(server) as host:
        await put(host, "a")
        await delete(host, "a")
        config = next(c for c in streams.stream_configs(SUBJECTS) if c["name"] == STREAM)
        body = json.dumps(config | {"deny_purge": True}).encode()
        changed = await host.admin.request(f"$JS.API.STREAM.UPDATE.{STREAM}", body)
        assert "error" not in json.loads(changed.data)

        with pytest.raises(NotProvisioned, match=rf"marker of .*{HOST}\.a: "):
            await compact(host.admin, SUBJECTS, now=later())


@pytest.mark.parametrize("name", ["*", ">"])
async def test_a_marker_with_a_wildcard_as_its_subject_removes_no_values(
    server: Server, name: str
) -> None:
    async with consuming_host(server) as host:
        await put(host, "a")
        subject = streams.state_subject(SUBJECTS, f"{HOST}.{name}")
        stored = await host.admin.request(subject, b"", headers={"KV-Operation": "DEL"})
        assert json.loads(stored.data)["seq"] > 1

        done = await compact(host.admin, SUBJECTS, now=later())

        assert (done.old, done.kept) == (0, 1)
        assert await host.bus.read_state(f"{HOST}.a") is not None


@dataclass
class Answering:
    """Gives one answer to all."""

    headers: dict[str, str]

    async def request(self, subject: str, payload: bytes) -> Message:
        return Message(subject, "", b"", self.headers)


MARKER = {"Nats-Subject": "$KV.s.a", "Nats-Sequence": "7", "KV-Operation": "DEL"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Status": "503", "Description": "no leader"},
        {**MARKER, "Nats-Sequence": "0", "Nats-Time-Stamp": "2020-01-01T00:00:00Z"},
        {**MARKER, "Nats-Sequence": "x", "Nats-Time-Stamp": "2020-01-01T00:00:00Z"},
        MARKER,
        {**MARKER, "Nats-Time-Stamp": "2020-01-01T00:00:00"},
        {**MARKER, "Nats-Time-Stamp": "yesterday"},
        {"Nats-Subject": "$KV.s.a", "Nats-Sequence": "7"},  # the same message without end
    ],
)
async def test_what_is_no_answer_of_a_server_ends_it(headers: dict[str, str]) -> None:
    async with asyncio.timeout(5):
        with pytest.raises(BusError, match="expected a"):
            await compact(Answering(headers), SUBJECTS)


async def hostd(server: Server, *args: str) -> Result:
    environment = {
        "HOSTD_CONFIG": None,
        "HOSTD_HOST_ID": HOST,
        "HOSTD_HOST_CELL": SUBJECTS.cell,
        "HOSTD_NATS_URL": server.url,
    }
    command = ["provision", "--compact", *args]
    return await asyncio.to_thread(CliRunner().invoke, main, command, env=environment)


async def test_the_command_says_what_it_removes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with consuming_host(server) as host:
        await put(host, "a")
        await delete(host, "a")

        kept = await hostd(server)
        monkeypatch.setattr(module, "KEEP", timedelta(0))
        seen = await hostd(server, "--dry-run")
        done = await hostd(server, "--json")
        again = await hostd(server)

    what = f"deletion markers of bucket {SUBJECTS.state_bucket}"
    assert f"found   {what}  (0 older than 1 h, 1 kept)" in kept.output
    assert f"stale   {what}  (1 older than 1 h, 0 kept)" in seen.output
    assert json.loads(done.stdout) == [
        {"what": what, "how": "removed", "detail": "1 older than 1 h, 0 kept"}
    ]
    assert f"found   {what}  (0 older than 1 h, 0 kept)" in again.output
    assert [each.exit_code for each in (kept, seen, done, again)] == [0, 1, 0, 0]


@pytest.mark.parametrize("other", ["--replicas=3", "--size=evt=9", "--mirror-of=d", "--host=h2"])
async def test_it_does_nothing_else(server: Server, other: str) -> None:
    refused = await hostd(server, other)

    assert refused.exit_code == 2
    assert "--compact goes with" in refused.output
