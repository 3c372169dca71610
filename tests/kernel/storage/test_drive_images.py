"""A patched template is as good a file system as mkfs makes."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.errors import Invalid
from handlers.host.storage import drive_images
from handlers.host.storage.drive_images import BLOCK, CONFIG, SECRETS, SmallDrive, SmallDrives


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


def content_of(drive: SmallDrive, path: Path) -> bytes:
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)
    out = path.with_suffix(".out")
    dump: list[str | Path] = ["debugfs", "-R", f"dump -p /{drive.file_name} {out}", path]
    subprocess.run(dump, check=True, capture_output=True)
    assert stat.S_IMODE(out.stat().st_mode) == drive.mode
    return out.read_bytes()


@pytest.mark.parametrize("drive", [CONFIG, SECRETS])
@pytest.mark.parametrize("size", [0, 1, 300, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 700_000])
def test_the_drive_holds_its_content(
    image: int, tmp_path: Path, drive: SmallDrive, size: int
) -> None:
    content = os.urandom(size)

    SmallDrives().write(image, drive, content)

    assert content_of(drive, tmp_path / "image") == content
    assert os.fstat(image).st_size == drive.size_bytes
    label: list[str | Path] = ["e2label", tmp_path / "image"]
    said = subprocess.run(label, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == drive.label


def test_nothing_of_one_tenants_content_is_in_the_next_image(image: int, tmp_path: Path) -> None:
    drives = SmallDrives()
    first = os.open(tmp_path / "first", os.O_RDWR | os.O_CREAT, 0o600)
    drives.write(first, SECRETS, b"SECRET-OF-ONE" * 100)
    os.close(first)

    drives.write(image, SECRETS, b"SECRET-OF-TWO")

    data = os.pread(image, SECRETS.size_bytes, 0)
    assert data.count(b"SECRET-OF-TWO") == 1
    assert b"SECRET-OF-ONE" not in data


def test_most_images_take_no_process(
    image: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drives = SmallDrives()
    drives.write(image, CONFIG, b"{}")
    monkeypatch.setattr("handlers.host.storage.mkfs.MKFS", "mkfs.nowhere")

    os.ftruncate(image, 0)
    drives.write(image, CONFIG, b'{"vcpus": 2}')

    assert content_of(CONFIG, tmp_path / "image") == b'{"vcpus": 2}'


def test_an_unexpected_layout_takes_the_slow_way(
    image: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(image: bytes, size: int, mode: int) -> None: ...

    monkeypatch.setattr(drive_images, "_find_inode", not_found)

    SmallDrives().write(image, CONFIG, b'{"vcpus": 2}')

    assert content_of(CONFIG, tmp_path / "image") == b'{"vcpus": 2}'


def test_too_much_content_is_invalid(image: int) -> None:
    with pytest.raises(Invalid, match=r"config\.json is [0-9]+ bytes, the limit is"):
        SmallDrives().write(image, CONFIG, bytes(CONFIG.content_max_bytes + 1))
