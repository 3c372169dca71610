"""The versions of Firecracker that the tests run against."""

from pathlib import Path

from tests.guests.firecracker import SHA256
from tests.guests.versions import found, laid_out


def test_complete_pairs_are_found_and_named_as_the_jailer_needs(tmp_path: Path) -> None:
    for name in ("firecracker-v1.9.0", "jailer-v1.9.0", "firecracker-v1.12.1", "jailer-v1.12.1"):
        (tmp_path / name).write_text(name)
    (tmp_path / "firecracker-v1.13.0").touch()
    (tmp_path / "jailer").touch()

    assert found(tmp_path) == ["1.9.0", "1.12.1"]
    here = laid_out(tmp_path, "1.12.1", tmp_path / "to")
    assert here.name == "v1.12.1"
    assert {path.name: path.read_text() for path in here.iterdir()} == {
        program: f"{program}-v1.12.1" for program in SHA256
    }
