"""agentd's directories are read with suspicion: each hostile case is refused and names its file."""

import asyncio
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from handlers.errors import Invalid, NotFound, Unavailable
from handlers.host.linux.file_threads import run_in_thread
from handlers.host.linux.openat2 import Directory
from handlers.host.storage import agentd_files
from handlers.host.storage.agentd_files import SharedFiles
from handlers.host.storage.instance_json import merged
from schemas.requests import InstanceRef
from tests.kernel.storage.store_host import REF, REVISION, StoreHost, give_to, make_world, write

AGENTD = 12345

T = TypeVar("T")


@pytest.fixture
def world(tmp_path: Path) -> StoreHost:
    return make_world(tmp_path)


@pytest.fixture
def shared(world: StoreHost) -> SharedFiles:
    return SharedFiles(str(world.data))


async def test_tenant_pool_and_instance_are_read(shared: SharedFiles) -> None:
    assert (await shared.tenant("acme")).net.tenant_net_id == 7
    assert (await shared.pool("acme", "web")).instance_resources.mem_mib == 128
    assert (await shared.instance(REF)).net.guest_ip == "10.240.7.3"
    assert (await shared.of_start(REF))[3] == REVISION
    assert await shared.secrets("acme") is None


async def test_what_a_launch_reads_takes_one_thread_call(
    shared: SharedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = (
        await shared.tenant("acme"),
        await shared.pool("acme", "web"),
        await shared.instance(REF),
    )
    begun: list[object] = []

    async def counted(work: Callable[[], T]) -> T:
        begun.append(work)
        return await run_in_thread(work)

    monkeypatch.setattr(agentd_files, "run_in_thread", counted)

    assert await shared.of_launch(REF) == each
    assert await shared.of_start(REF) == (*each, REVISION)
    assert len(begun) == 2  # one each


async def test_files_of_many_instances_take_one_thread_call_and_each_may_fail(
    shared: SharedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []

    async def counted(work: Callable[[], T]) -> T:
        begun.append(work)
        return await run_in_thread(work)

    alone = await shared.instance(REF)
    monkeypatch.setattr(agentd_files, "run_in_thread", counted)
    gone, hostile = InstanceRef("acme", "web", "gone"), InstanceRef("acme", "..", "i-1")

    found = await shared.instances([gone, REF, hostile])

    assert found[REF] == alone
    assert isinstance(found[gone], NotFound)
    assert isinstance(found[hostile], Invalid)
    assert len(begun) == 1


@pytest.mark.parametrize(
    "hostile", [InstanceRef("acme", "..", "i-1"), InstanceRef("acme", "web", "../i-0a1b2c3d")]
)
async def test_a_launch_reads_nothing_at_an_invalid_id(
    shared: SharedFiles, hostile: InstanceRef
) -> None:
    for read in (shared.of_launch, shared.of_start):
        with pytest.raises(Invalid, match="invalid ID"):
            await read(hostile)


async def test_a_missing_file_is_not_found_and_named(shared: SharedFiles, world: StoreHost) -> None:
    (world.instance / "instance.json").unlink()

    with pytest.raises(NotFound, match=r"i-0a1b2c3d/instance\.json"):
        await shared.instance(REF)
    with pytest.raises(NotFound, match="nobody"):
        await shared.instance(InstanceRef("nobody", "web", "i-1"))


@pytest.mark.parametrize(
    "data", [b"", b'{"instance_id": "i-0a', b"[]", b"\xff\xfe", b"{" * 100_000]
)
async def test_a_malformed_file_is_invalid_and_named(
    shared: SharedFiles, world: StoreHost, data: bytes
) -> None:
    write(world.instance / "instance.json", data)

    with pytest.raises(Invalid, match=r"instance\.json"):
        await shared.instance(REF)


@pytest.mark.parametrize(
    "deep", [b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"]
)
async def test_an_update_of_a_deeply_nested_file_is_invalid(
    shared: SharedFiles, world: StoreHost, deep: bytes
) -> None:
    write(world.instance / "instance.json", deep)

    with pytest.raises(Invalid, match=r"instance\.json"):
        await shared.update_instance(REF, {"status": "running"})


async def test_another_tenants_file_is_refused(shared: SharedFiles, world: StoreHost) -> None:
    text = (world.instance / "instance.json").read_text()
    write(world.instance / "instance.json", text.replace('"acme"', '"other"'))

    with pytest.raises(Invalid, match="tenant_id"):
        await shared.instance(REF)


def link_file(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def second_name(path: Path) -> None:
    os.link(path, path.with_suffix(".second"))


def too_large(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2 << 20)


def dir_becomes_link(path: Path) -> None:
    moved = path.parent.with_name("moved")
    path.parent.rename(moved)
    path.parent.symlink_to(moved)


@pytest.mark.parametrize(
    "spoil", [link_file, fifo, directory, second_name, too_large, dir_becomes_link]
)
async def test_a_hostile_file_is_invalid(shared: SharedFiles, world: StoreHost, spoil) -> None:  # type: ignore[no-untyped-def]
    spoil(world.instance / "instance.json")

    async with asyncio.timeout(5):
        with pytest.raises(Invalid, match=str(world.instance)):
            await shared.instance(REF)


async def test_secrets_that_are_a_link_to_anothers_are_refused(
    shared: SharedFiles, world: StoreHost
) -> None:
    (world.tenant / "secrets.json").symlink_to("/etc/shadow")

    with pytest.raises(Invalid, match="is a symlink"):
        await shared.secrets("acme")


async def test_secrets_are_read_as_they_are(shared: SharedFiles, world: StoreHost) -> None:
    write(world.tenant / "secrets.json", b'{"k": "v"}\n')

    assert await shared.secrets("acme") == b'{"k": "v"}\n'


@pytest.mark.parametrize(
    "target",
    [
        "/var/lib/x",
        "../../../other/pools/p/artifacts/revisions/a",
        "revisions/../../x",
        "revisions/A",
        "revisions/a/",
        "revisions/a\n",
        "revisions/" + "a" * 65,
    ],
)
async def test_current_says_nothing_but_a_revision(
    shared: SharedFiles, world: StoreHost, target: str
) -> None:
    current = world.pool / "artifacts" / "current"
    current.unlink()
    current.symlink_to(target)

    with pytest.raises(Invalid, match="current"):
        await shared.of_start(REF)


async def test_current_must_be_a_link_and_there(shared: SharedFiles, world: StoreHost) -> None:
    current = world.pool / "artifacts" / "current"
    current.unlink()
    with pytest.raises(NotFound, match="the pool has no artifacts"):
        await shared.of_start(REF)

    current.write_text(f"revisions/{REVISION}")
    with pytest.raises(Invalid, match="not a symlink"):
        await shared.of_start(REF)


async def test_an_update_keeps_all_that_is_not_hostds(
    shared: SharedFiles, world: StoreHost
) -> None:
    path = world.instance / "instance.json"
    old = path.read_text()[:-2] + ',\n  "later": {"n": 1.00, "s": "\\u00e9"}\n}'
    write(path, old)
    give_to(world, AGENTD)
    path.chmod(0o640)

    await shared.update_instance(REF, {"status": "failed", "firecracker_pid": 4711})

    new = path.read_text()
    assert json.loads(new) == json.loads(old) | {"status": "stopped", "firecracker_pid": 4711}
    assert list(json.loads(new))[: len(json.loads(old))] == list(json.loads(old))
    assert '{"n": 1.00, "s": "\\u00e9"}' in new
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (AGENTD, AGENTD, 0o640)
    assert sorted(each.name for each in world.instance.iterdir()) == ["instance.json"]


async def test_an_update_that_changes_nothing_writes_nothing(
    shared: SharedFiles, world: StoreHost
) -> None:
    before = (world.instance / "instance.json").stat()

    await shared.update_instance(REF, {"status": "created"})

    assert (world.instance / "instance.json").stat().st_ino == before.st_ino


@pytest.mark.parametrize("changes", [{"net": {}}, {"status": "starting"}, {"tags": {}}])
async def test_only_hostds_fields_can_be_changed(
    shared: SharedFiles, changes: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="cannot update instance"):
        await shared.update_instance(REF, changes)


async def test_an_update_follows_no_link(shared: SharedFiles, world: StoreHost) -> None:
    outside = write(world.top / "outside.json", b"{}")
    path = world.instance / "instance.json"
    path.unlink()
    path.symlink_to(outside)

    with pytest.raises(Invalid):
        await shared.update_instance(REF, {"status": "running"})

    assert outside.read_bytes() == b"{}"


async def test_a_file_rewritten_meanwhile_is_read_again(
    shared: SharedFiles, world: StoreHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.instance / "instance.json"

    def agentd_writes_once(data: bytes, changes: dict[str, object], name: str) -> bytes:
        monkeypatch.undo()
        new = path.with_name("new")
        new.write_bytes(data.replace(b'"created"', b'"ready"').replace(b"0.1", b"0.9"))
        new.rename(path)
        return merged(data, changes, name)

    monkeypatch.setattr("handlers.host.storage.instance_json.merged", agentd_writes_once)

    await shared.update_instance(REF, {"firecracker_pid": 1})

    assert json.loads(path.read_text())["status"] == "ready"
    assert json.loads(path.read_text())["idle_metrics"] == {"cpu_pct": 0.9}
    assert json.loads(path.read_text())["firecracker_pid"] == 1


async def test_a_file_that_never_holds_still_is_unavailable(
    shared: SharedFiles, world: StoreHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.instance / "instance.json"

    def agentd_always_writes(data: bytes, changes: dict[str, object], name: str) -> bytes:
        write(path, data + b" ")
        return merged(data, changes, name)

    monkeypatch.setattr("handlers.host.storage.instance_json.merged", agentd_always_writes)

    with pytest.raises(Unavailable):
        await shared.update_instance(REF, {"firecracker_pid": 1})

    assert "4711" not in path.read_text()


async def test_an_update_that_was_prepared_is_done_and_keeps_what_is_not_hostds(
    shared: SharedFiles, world: StoreHost
) -> None:
    path = world.instance / "instance.json"
    give_to(world, AGENTD)
    path.chmod(0o640)
    old = path.read_bytes()
    changes = {"status": "running", "firecracker_pid": 4711}

    prepared = await shared.prepare_update(REF, changes)
    assert prepared is not None
    assert path.read_bytes() == old
    assert await prepared.apply(changes)
    prepared.close()

    assert json.loads(path.read_bytes()) == json.loads(old) | changes
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (AGENTD, AGENTD, 0o640)
    assert [each.name for each in world.instance.iterdir()] == ["instance.json"]


@pytest.mark.parametrize("what", ["other changes", "the file", "the directory", "nothing"])
async def test_a_prepared_update_is_not_done_if_anything_changed(
    shared: SharedFiles, world: StoreHost, what: str
) -> None:
    path = world.instance / "instance.json"
    changes = {"status": "running", "firecracker_pid": 4711}
    prepared = await shared.prepare_update(REF, changes)
    assert prepared is not None

    if what == "the file":
        write(path, path.read_bytes().replace(b"0.1", b"0.9"))
    elif what == "the directory":
        world.instance.rename(world.instance.with_name("other"))
        write(path, path.parent.with_name("other").joinpath("instance.json").read_bytes())
    old = path.read_bytes()
    done = what != "nothing" and await prepared.apply(
        changes | {"firecracker_pid": 1} if what == "other changes" else changes
    )
    prepared.close()

    assert not done
    assert path.read_bytes() == old
    assert [each.name for each in world.instance.iterdir()] == ["instance.json"]


async def test_an_update_that_cannot_be_prepared_is_done_all_the_same(
    shared: SharedFiles, world: StoreHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_such_files(*_: object, **__: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(Directory, "unnamed", no_such_files)

    assert await shared.prepare_update(REF, {"status": "running"}) is None
    await shared.update_instance(REF, {"status": "running"})

    assert json.loads((world.instance / "instance.json").read_bytes())["status"] == "running"


async def test_removal_keeps_volumes_if_asked(shared: SharedFiles, world: StoreHost) -> None:
    write(world.instance / "volumes" / "data.ext4", b"data")
    write(world.instance / "runtime" / "deep" / "file", b"x")
    outside = write(world.top / "outside", b"untouched")
    (world.instance / "runtime" / "link").symlink_to(world.top)

    await shared.remove_instance(REF, keep_volumes=True)

    assert [each.name for each in world.instance.iterdir()] == ["volumes"]
    assert (world.instance / "volumes" / "data.ext4").read_bytes() == b"data"
    assert outside.read_bytes() == b"untouched"

    await shared.remove_instance(REF, keep_volumes=False)
    await shared.remove_instance(REF, keep_volumes=False)

    assert not world.instance.exists()


@pytest.mark.parametrize("bad", ["..", "a/b", "", "A", "x\n", "a" * 64])
async def test_an_id_never_becomes_another_path(shared: SharedFiles, bad: str) -> None:
    with pytest.raises(Invalid):
        await shared.tenant(bad)
    with pytest.raises(Invalid):
        await shared.instance(InstanceRef("acme", bad, "i-1"))
    with pytest.raises(Invalid):
        await shared.remove_instance(InstanceRef("acme", "web", bad), keep_volumes=False)
