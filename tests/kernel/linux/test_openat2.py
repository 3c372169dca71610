"""Nothing leads out of a directory; a replaced file is the old or the new one, never less."""

import asyncio
import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlers.errors import Exhausted, Invalid, NotFound, Unavailable
from handlers.host.linux.file_threads import CancelToken, run_in_slow_thread, run_in_thread
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.rmtree import remove_tree
from tests.kernel.storage.store_host import write


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "sub/../../outside", "link/file"])
def test_no_name_leads_out(tmp_path: Path, name: str) -> None:
    write(tmp_path / "outside", b"secret")
    write(tmp_path / "in" / "sub" / "file", b"x")
    (tmp_path / "in" / "link").symlink_to(tmp_path)

    with (
        Directory.trusted(str(tmp_path / "in")) as directory,
        pytest.raises(Invalid),
        directory.file(name),
    ):
        pass


def test_a_name_that_is_no_text_is_opened_as_any_other(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xe9-\xc3\xa9")
    write(tmp_path / name, b"mine")

    with Directory.trusted(str(tmp_path)) as directory:
        assert directory.names(9) == [name]
        assert directory.read(name, 100)[0] == b"mine"


def test_a_swap_while_it_is_read_never_shows_the_other_file(tmp_path: Path) -> None:
    """An unprivileged racer flips a directory between itself and a link, as fast as it can."""
    write(tmp_path / "in" / "real" / "file", b"mine")
    write(tmp_path / "other" / "file", b"not mine")
    (tmp_path / "in" / "evil").symlink_to(tmp_path / "other")
    os.rename(tmp_path / "in" / "real", tmp_path / "in" / "it")
    done = threading.Event()

    def race() -> None:
        base = str(tmp_path / "in")
        while not done.is_set():
            os.rename(f"{base}/it", f"{base}/real")
            os.rename(f"{base}/evil", f"{base}/it")
            os.rename(f"{base}/it", f"{base}/evil")
            os.rename(f"{base}/real", f"{base}/it")

    racer = threading.Thread(target=race)
    racer.start()
    seen: set[str] = set()
    with Directory.trusted(str(tmp_path / "in")) as directory:
        # At least 3000 reads, and as many more as it takes to see the file between two swaps.
        for attempt in range(300_000):
            if attempt >= 3000 and "mine" in seen:
                break
            try:
                seen.add(directory.read("it/file", 100)[0].decode())
            except (Invalid, NotFound, Unavailable) as error:
                seen.add(type(error).__name__)
    done.set()
    racer.join()

    assert "mine" in seen
    assert "not mine" not in seen


def test_a_replaced_file_keeps_owner_group_and_mode(tmp_path: Path) -> None:
    path = write(tmp_path / "file", b"old")
    os.chown(path, 1234, 5678)
    path.chmod(0o604)

    with Directory.trusted(str(tmp_path)) as directory:
        directory.replace("file", b"new", uid=1234, gid=5678, mode=0o604)

    found = path.stat()
    assert path.read_bytes() == b"new"
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o604)
    assert os.listdir(tmp_path) == ["file"]


def test_a_replacement_cut_short_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "file", b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with Directory.trusted(str(tmp_path)) as directory, pytest.raises(Exhausted):
        directory.replace("file", b"new", uid=0, gid=0, mode=0o644)

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_planted_link_beside_the_file_is_not_written_through(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", b"untouched")
    path = write(tmp_path / "in" / "file", b"old")
    (tmp_path / "in" / ".file.hostd").symlink_to(outside)

    with Directory.trusted(str(tmp_path / "in")) as directory:
        directory.replace("file", b"new", uid=0, gid=0, mode=0o644)

    assert (path.read_bytes(), outside.read_bytes()) == (b"new", b"untouched")


def test_a_tree_of_any_depth_is_removed_and_no_link_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside" / "file", b"untouched")
    (tmp_path / "tree").mkdir()
    top = os.open(tmp_path / "tree", os.O_RDONLY)
    at = os.dup(top)
    for _ in range(3000):
        os.mkdir("d", dir_fd=at)
        os.symlink(str(tmp_path / "outside"), "link", dir_fd=at)
        deeper = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = deeper
    os.close(at)
    os.close(top)
    os.mkfifo(tmp_path / "tree" / "fifo")

    parent = os.open(tmp_path, os.O_RDONLY)
    remove_tree(parent, "tree")
    remove_tree(parent, "tree")
    os.close(parent)

    assert sorted(os.listdir(tmp_path)) == ["outside"]
    assert outside.read_bytes() == b"untouched"


PARTS = st.sampled_from(
    ["..", ".", "", "in", "sub", "up", "out", "abs", "file", "loop", "\n", "a" * 256]
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(PARTS, min_size=1, max_size=8), slash=st.booleans())
def test_whatever_the_name_only_what_is_inside_is_read(
    tmp_path: Path, parts: list[str], slash: bool
) -> None:
    if not (tmp_path / "in").exists():
        write(tmp_path / "file", b"outside")
        write(tmp_path / "in" / "sub" / "file", b"inside")
        write(tmp_path / "in" / "file", b"inside")
        for name, target in (("up", ".."), ("out", "../file"), ("abs", "/"), ("loop", "loop")):
            (tmp_path / "in" / "sub" / name).symlink_to(target)
            (tmp_path / "in" / name).symlink_to(target)

    with Directory.trusted(str(tmp_path / "in")) as directory:
        try:
            data, _ = directory.read("/" * slash + "/".join(parts), 100)
        except (Invalid, NotFound):
            return
    assert data == b"inside"


async def test_cancelled_slow_work_ends_at_its_next_chunk() -> None:
    started = threading.Event()

    def work(pace: CancelToken) -> None:
        started.set()
        while True:
            pace.check()

    task = asyncio.create_task(run_in_slow_thread(work))
    await asyncio.to_thread(started.wait, 10)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


async def test_a_cancelled_caller_still_waits_for_its_thread() -> None:
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go_on.wait(10)
        ended.set()

    task = asyncio.create_task(run_in_thread(work))
    await asyncio.to_thread(started.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
