"""A call that hangs is abandoned and may go on: no descriptor of it is another file's by then."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from handlers.errors import Abandoned, Unavailable
from handlers.host.linux import file_threads
from handlers.host.linux.call_threads import CallThreads
from handlers.host.linux.file_threads import HandedFd
from handlers.host.linux.kernel_thread import nothing
from handlers.host.linux.openat2 import Directory
from handlers.host.storage import instance_json
from handlers.host.storage.agentd_files import SharedFiles
from handlers.host.vmm import spawn
from tests.kernel.storage.store_host import REF, make_world

CHANGES = {"status": "running"}


@pytest.fixture
async def threads(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[CallThreads[None]]:
    """File threads whose calls are abandoned soon."""
    made = CallThreads("files", limit_s=0.05, open=nothing, close=lambda _: None, count=2)
    monkeypatch.setattr(file_threads, "_quick", made)
    yield made
    made.stop()


async def returned(threads: CallThreads[None]) -> None:
    async with asyncio.timeout(10):
        while threads.hung:
            await asyncio.sleep(0.001)


def others_file(tmp_path: Path, numbers: range) -> list[int]:
    """Another tenant's file, at each free number in reach."""
    path = tmp_path / "secret-of-another"
    path.write_text("secret")
    return [os.open(path, os.O_RDWR | os.O_APPEND) for _ in numbers]


async def test_an_abandoned_update_is_not_done_by_another_file(
    threads: CallThreads[None], tmp_path: Path
) -> None:
    answers = threading.Event()
    place = tmp_path / "instance"
    place.mkdir()
    (place / "instance.json").write_text(json.dumps({"status": "stopped"}))

    def reopen() -> Directory:
        answers.wait()
        return Directory.trusted(str(place))

    with Directory.trusted(str(place)) as directory:
        prepared = instance_json.prepare(directory, CHANGES, HandedFd(), reopen=reopen)
    assert prepared is not None
    with pytest.raises(Abandoned):
        await prepared.apply(CHANGES)
    prepared.close()
    others = others_file(tmp_path, range(16))
    answers.set()
    await returned(threads)
    for each in others:
        os.close(each)

    assert json.loads((place / "instance.json").read_bytes()) == CHANGES
    assert [each.name for each in place.iterdir()] == ["instance.json"]


def descriptors() -> set[tuple[int, int]]:
    """Number and inode of each file that this process has open."""
    found: set[tuple[int, int]] = set()
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.add((int(each), os.fstat(int(each)).st_ino))
    return found


@pytest.mark.parametrize("cancelled", [False, True])
async def test_an_update_that_was_prepared_for_nobody_leaves_no_descriptor(
    threads: CallThreads[None],
    cancelled: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = SharedFiles(str(make_world(tmp_path).data))
    begun, answers = threading.Event(), threading.Event()
    make, made = Directory.unnamed, list[int]()

    def unnamed(self: Directory, data: bytes, *, uid: int, gid: int, mode: int) -> int:
        begun.set()
        answers.wait()
        made.append(make(self, data, uid=uid, gid=gid, mode=mode))
        return made[0]

    monkeypatch.setattr(Directory, "unnamed", unnamed)
    before = descriptors()
    preparing = asyncio.create_task(shared.prepare_update(REF, CHANGES))
    await asyncio.to_thread(begun.wait)
    if cancelled:
        preparing.cancel()
        answers.set()
    with pytest.raises((Abandoned, asyncio.CancelledError)):
        await preparing
    answers.set()
    await returned(threads)

    assert made
    assert descriptors() <= before


async def test_an_abandoned_program_is_not_executed(
    threads: CallThreads[None], tmp_path: Path
) -> None:
    answers = threading.Event()
    output = os.memfd_create("output")

    def prepare() -> None:
        answers.wait()

    with pytest.raises(Abandoned):
        await spawn.run(["/bin/echo", "x"], output, first=prepare)
    os.close(output)
    others = others_file(tmp_path, range(16))
    answers.set()
    await returned(threads)
    for each in others:
        os.close(each)

    assert (tmp_path / "secret-of-another").read_text() == "secret"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


async def test_the_descriptor_of_a_call_that_was_refused_is_closed(
    threads: CallThreads[None],
) -> None:
    output = os.memfd_create("output")
    before = set(os.listdir("/proc/self/fd"))

    def refuse(*_: object) -> None:
        raise Unavailable("too many hang")

    threads.begin_uncut = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(Unavailable):
        await spawn.run(["/bin/true"], output)
    after = set(os.listdir("/proc/self/fd"))
    os.close(output)

    assert len(after) == len(before)


async def test_a_descriptor_is_closed_once_by_whoever_has_it() -> None:
    fd = os.memfd_create("one")
    handed = HandedFd(fd)

    with handed.taken() as own:
        handed.close()
        assert os.fstat(own)
    handed.close()

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_a_descriptor_that_comes_too_late_is_closed() -> None:
    fd = os.memfd_create("one")
    handed = HandedFd()
    handed.close()

    handed.put(fd)

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
