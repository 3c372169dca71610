"""Provisioning: complete, repeatable, corrects what differs, names what it cannot; old servers."""

import asyncio
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from schemas.settings import NatsSettings
from schemas.subjects import Subjects
from tests.broker.server import (
    HOST,
    OLD_SERVER,
    QUICK,
    SUBJECTS,
    Server,
    connection_to,
    consuming_host,
    running_server,
)
from tests.soak.cluster import Cluster
from worker.bus import streams
from worker.bus.connection import Connection
from worker.bus.nats import NatsBus
from worker.bus.protocol import BusError, NotProvisioned
from worker.bus.provision import provision, provision_mirrors
from worker.demo import nats_server

OBJECTS = 5


async def api(
    connection: Connection, endpoint: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    data = json.dumps(body).encode() if body else b""
    answer: dict[str, Any] = json.loads(
        (await connection.request(f"$JS.API.{endpoint}", data)).data
    )
    return answer


async def test_it_creates_everything_once(server: Server) -> None:
    async with connection_to(server.url) as admin:
        first = await provision(admin, SUBJECTS, ["h1", "h2"])
        second = await provision(admin, SUBJECTS, ["h1", "h2"])

        assert [made.how for made in first] == ["made"] * (OBJECTS + 2)
        assert [made.detail for made in first] == [""] * (OBJECTS + 2)
        assert [made.how for made in second] == ["found"] * (OBJECTS + 2)
        assert str(first[-1]) == f"made    consumer h2 of {SUBJECTS.commands_stream}"
        for host in ("h1", "h2"):
            bus = NatsBus(
                NatsSettings(url=server.url),
                Subjects(SUBJECTS.root, host, SUBJECTS.cell),
                tuning=QUICK,
            )
            await bus.start()
            await bus.wait_provisioned()
            await bus.close()


async def test_it_resets_what_was_changed(server: Server) -> None:
    async with connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST])
        name = SUBJECTS.events_stream
        config = (await api(admin, f"STREAM.INFO.{name}"))["config"]
        config |= {"max_age": 60 * streams.NS, "duplicate_window": 60 * streams.NS}
        assert "error" not in await api(admin, f"STREAM.UPDATE.{name}", config)
        stream = SUBJECTS.commands_stream
        consumer = (await api(admin, f"CONSUMER.INFO.{stream}.{HOST}"))["config"]
        body = {"stream_name": stream, "config": {**consumer, "max_deliver": 3}}
        assert "error" not in await api(admin, f"CONSUMER.DURABLE.CREATE.{stream}.{HOST}", body)

        made = await provision(admin, SUBJECTS, [HOST])

        changed = {one.what: one.detail for one in made if one.how == "changed"}
        assert set(changed) == {f"stream {name}", f"consumer {HOST} of {stream}"}
        assert "max_age: is 60000000000, must be 604800000000000" in changed[f"stream {name}"]
        assert changed[f"consumer {HOST} of {stream}"] == "max_deliver: is 3, must be -1"
        assert {one.how for one in await provision(admin, SUBJECTS, [HOST])} == {"found"}


async def test_mirrors_are_made_once_and_not_moved_to_another_cell(server: Server) -> None:
    async with connection_to(server.url) as admin:
        made = [await provision_mirrors(admin, SUBJECTS, "hub") for _ in range(2)]

        assert [one.how for one in made[0]] == ["made"] * 3
        assert [one.how for one in made[1]] == ["found"] * 3
        assert [one.what for one in made[0]] == [
            f"mirror of stream {SUBJECTS.events_stream}",
            f"mirror of stream {SUBJECTS.dead_stream}",
            f"mirror of bucket {SUBJECTS.state_bucket}",
        ]
        with pytest.raises(NotProvisioned, match=r"mirror: is .*hub.*remove it first"):
            await provision_mirrors(admin, SUBJECTS, "other")


async def test_a_cell_and_its_mirrors_are_not_made_on_one_server(server: Server) -> None:
    async with connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST])
        with pytest.raises(NotProvisioned, match="connect to the server that keeps the copies"):
            await provision_mirrors(admin, SUBJECTS, "hub")
        await api(admin, f"STREAM.DELETE.{SUBJECTS.events_stream}")
        (mirror, *_) = streams.mirror_configs(SUBJECTS, "hub")
        assert "error" not in await api(admin, f"STREAM.CREATE.{mirror['name']}", mirror)

        with pytest.raises(NotProvisioned, match="connect to a server of the cell"):
            await provision(admin, SUBJECTS, [HOST])


async def test_a_dry_run_tells_the_differences_and_corrects_nothing(server: Server) -> None:
    async with connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST])
        stream = SUBJECTS.commands_stream
        consumer = (await api(admin, f"CONSUMER.INFO.{stream}.{HOST}"))["config"]
        body = {"stream_name": stream, "config": {**consumer, "max_deliver": 3}}
        assert "error" not in await api(admin, f"CONSUMER.DURABLE.CREATE.{stream}.{HOST}", body)

        for _ in range(2):
            found = await provision(admin, SUBJECTS, [HOST], dry_run=True)
            wrong = [(one.how, one.detail) for one in found if one.how != "found"]
            assert wrong == [("differs", "max_deliver: is 3, must be -1")]


async def test_replicas_and_placement_are_kept_unless_others_are_asked_for(
    tmp_path: Path,
) -> None:
    cluster = Cluster(str(tmp_path), tags=("fast",))
    await cluster.start()
    try:
        async with connection_to(cluster.url) as admin:
            # Until the servers have elected a leader, nothing is made.
            placement = {"tags": ["fast"]}
            async with asyncio.timeout(60):
                while True:
                    try:
                        await provision(admin, SUBJECTS, [HOST], replicas=3, placement=placement)
                    except (BusError, NotProvisioned):
                        await asyncio.sleep(0.2)
                    else:
                        break
            config = await stream_config(admin) | {"max_age": streams.DAY_NS}
            answer = await api(admin, f"STREAM.UPDATE.{SUBJECTS.events_stream}", config)
            assert "error" not in answer

            made = await provision(admin, SUBJECTS, [HOST])
            again = await provision(
                admin, SUBJECTS, [HOST], replicas=3, placement=placement, dry_run=True
            )

            changed = [one.what for one in made if one.how == "changed"]
            assert changed == [f"stream {SUBJECTS.events_stream}"]
            assert {one.how for one in again} == {"found"}
            config = await stream_config(admin)
            assert config["num_replicas"] == 3
            assert config["placement"] == placement
            assert config["max_age"] == 7 * streams.DAY_NS

            fewer = await provision(admin, SUBJECTS, [HOST], replicas=1)
            assert {one.how for one in fewer if "consumer" not in one.what} == {"changed"}
            assert (await stream_config(admin))["num_replicas"] == 1
    finally:
        await cluster.stop()


@pytest.mark.parametrize("first", ["cluster", "tags"])
async def test_the_part_of_a_placement_that_is_not_asked_for_stays(
    server: Server, first: str
) -> None:
    both: dict[str, Any] = {"cluster": "east", "tags": ["fast"]}
    then = "tags" if first == "cluster" else "cluster"
    async with connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST], placement={first: both[first]})

        await provision(admin, SUBJECTS, [HOST], placement={then: both[then]})
        again = await provision(admin, SUBJECTS, [HOST], placement={first: both[first]})

        assert (await stream_config(admin))["placement"] == both
        assert {one.how for one in again} == {"found"}


async def stream_config(admin: Connection) -> dict[str, Any]:
    config: dict[str, Any] = (await api(admin, f"STREAM.INFO.{SUBJECTS.events_stream}"))["config"]
    return config


async def configurations(admin: Connection) -> dict[str, dict[str, Any]]:
    """Of all streams, the bucket's among them, and of the consumer of `HOST`."""
    found = {
        name: (await api(admin, f"STREAM.INFO.{name}"))["config"]
        for name in streams.kinds(SUBJECTS)
    }
    stream = SUBJECTS.commands_stream
    found[HOST] = (await api(admin, f"CONSUMER.INFO.{stream}.{HOST}"))["config"]
    return found


@pytest.mark.parametrize("program", ["", str(OLD_SERVER)])
async def test_each_object_says_what_it_is_and_whose(tmp_path: Path, program: str) -> None:
    async with (
        running_server(tmp_path / "nats", program=program) as server,
        connection_to(server.url) as admin,
    ):
        await provision(admin, SUBJECTS, [HOST])

        found = await configurations(admin)

        assert all(config["description"].startswith("hostd, cell ") for config in found.values())
        if not program:  # a server before 2.10 has no metadata
            for config in found.values():
                assert streams.METADATA.items() <= config["metadata"].items()


@pytest.mark.parametrize("program", ["", str(OLD_SERVER)])
async def test_a_cell_without_descriptions_gets_them_once_and_others_stay(
    tmp_path: Path, program: str
) -> None:
    own = SUBJECTS.events_stream
    async with (
        running_server(tmp_path / "nats", program=program) as server,
        connection_to(server.url) as admin,
    ):
        await provision(admin, SUBJECTS, [HOST])
        for name, config in (await configurations(admin)).items():
            config["description"] = "ours" if name == own else ""
            endpoint, body = f"STREAM.UPDATE.{name}", config
            if name == HOST:
                stream = SUBJECTS.commands_stream
                endpoint = f"CONSUMER.DURABLE.CREATE.{stream}.{HOST}"
                body = {"stream_name": stream, "config": config}
            assert "error" not in await api(admin, endpoint, body)

        first = await provision(admin, SUBJECTS, [HOST])
        second = await provision(admin, SUBJECTS, [HOST])

        assert [one.what for one in first if one.how == "found"] == [f"stream {own}"]
        assert {one.how for one in second} == {"found"}
        found = await configurations(admin)
        assert found.pop(own)["description"] == "ours"
        assert all(config["description"].startswith("hostd, cell ") for config in found.values())


async def test_a_change_stores_its_hostd_version_beside_the_metadata_of_others(
    server: Server,
) -> None:
    async with connection_to(server.url) as admin:
        await provision(admin, SUBJECTS, [HOST])
        stream = SUBJECTS.commands_stream
        older = {"team": "platform", "hostd_version": "0.0.0"}
        for name, config in (await configurations(admin)).items():
            config |= {"description": "ours", "metadata": {**config["metadata"], **older}}
            endpoint, body = f"STREAM.UPDATE.{name}", {**config, "duplicate_window": streams.NS}
            if name == HOST:
                endpoint = f"CONSUMER.DURABLE.CREATE.{stream}.{HOST}"
                body = {"stream_name": stream, "config": {**config, "max_deliver": 3}}
            assert "error" not in await api(admin, endpoint, body)

        made = await provision(admin, SUBJECTS, [HOST])

        assert {one.how for one in made} == {"changed"}
        for config in (await configurations(admin)).values():
            assert config["description"] == "ours"
            own = {key: text for key, text in config["metadata"].items() if key[0] != "_"}
            assert own == {"team": "platform", **streams.METADATA}


async def test_it_names_what_it_cannot_change(server: Server) -> None:
    async with connection_to(server.url) as admin:
        name = SUBJECTS.commands_stream
        wrong = {"name": name, "subjects": [SUBJECTS.of_all_hosts("cmd")], "storage": "memory"}
        await api(admin, f"STREAM.CREATE.{name}", wrong)

        seen = await provision(admin, SUBJECTS, [HOST], dry_run=True)
        (differs,) = [one for one in seen if one.how == "differs"]
        assert re.search(r"storage: is 'memory'.*remove it first", differs.detail)
        assert "missing" in {one.how for one in seen}  # it goes on after it
        with pytest.raises(NotProvisioned, match=r"storage: is 'memory'.*remove it first"):
            await provision(admin, SUBJECTS, [HOST])


async def test_overlapping_subjects_are_reported(server: Server) -> None:
    async with connection_to(server.url) as admin:
        foreign = {"name": "ALL", "subjects": [f"{SUBJECTS.root}.>"], "storage": "file"}
        await api(admin, "STREAM.CREATE.ALL", foreign)

        with pytest.raises(NotProvisioned, match="overlap"):
            await provision(admin, SUBJECTS, [HOST])


async def test_a_server_without_jetstream_is_reported(tmp_path: Path) -> None:
    accounts = "accounts { A { users: [{ user: a, password: a }] } }"
    async with running_server(tmp_path / "nats", config=accounts) as server:
        url = server.url.replace("//", "//a:a@")
        async with connection_to(url) as admin:
            with pytest.raises((NotProvisioned, BusError), match=r"[Jj]et[Ss]tream"):
                await provision(admin, SUBJECTS, [HOST])


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("max_deliver", 5, "max_deliver: is 5, must be -1"),
        ("filter_subject", f"{SUBJECTS.root}.h9.cmd.>", "filter_subject: is"),
    ],
)
async def test_the_worker_finds_a_wrong_consumer(
    server: Server, field: str, value: object, part: str
) -> None:
    async with consuming_host(server) as host:
        stream = SUBJECTS.commands_stream
        await api(host.admin, f"CONSUMER.DELETE.{stream}.{HOST}")
        config = streams.consumer_config(SUBJECTS) | {field: value}
        body = {"stream_name": stream, "config": config}
        await api(host.admin, f"CONSUMER.DURABLE.CREATE.{stream}.{HOST}", body)

        with pytest.raises(NotProvisioned) as raised:
            await host.bus.verify()

        assert f"consumer {HOST} of {stream}: {part}" in str(raised.value)
        assert "Run `hostd provision`" in str(raised.value)


async def test_commands_are_limited_in_size(server: Server) -> None:
    async with consuming_host(server) as host:
        subject = f"{SUBJECTS.root}.{HOST}.cmd.host"
        largest = b"x" * 65_000
        assert b'"seq"' in (await host.admin.request(subject, largest)).data

        refused = await host.admin.request(subject, b"x" * 66_000)

        assert json.loads(refused.data)["error"]["err_code"] == 10054


@pytest.mark.skipif(not OLD_SERVER.exists() and not os.environ.get("CI"), reason=f"no {OLD_SERVER}")
async def test_the_oldest_server_that_is_supported(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "nats", program=str(OLD_SERVER)) as server,
        consuming_host(server, window=4) as host,
    ):
        assert {one.how for one in await provision(host.admin, SUBJECTS, ["h2"])} >= {"found"}
        await host.bus.verify()
        for number in range(20):
            await host.command(f"c{number}".encode())
        await host.command(b"last")
        assert await host.receiver.wait_for(b"last", 5)
        revision = await host.bus.write_state("h1.host", b"v", revision=0)
        assert await host.bus.read_state("h1.host") == (b"v", revision)
        await server.crash()
        await host.command(b"again")
        assert await host.receiver.wait_for(b"again", 5)
        assert host.receiver.most <= 4


async def test_a_store_that_is_too_small_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_server, "STORE", "1GB")
    async with running_server(tmp_path / "small") as small, connection_to(small.url) as connection:
        with pytest.raises(NotProvisioned, match=r"it reserves 1024 MiB; raise max_file_store"):
            await provision(connection, SUBJECTS, ["h1"])
