"""Directories that are made while others remove empty ones beside them."""

import os
from pathlib import Path

import pytest

from handlers.host.linux.state_dirs import ATTEMPTS, make_dir, remove_empty


class Remover:
    """`os.mkdir` before which somebody removes the directory above, the first `times`."""

    def __init__(self, base: Path, times: int) -> None:
        self._base, self._times = str(base), times
        self._mkdir = os.mkdir

    def __call__(self, path: str, mode: int = 0o777) -> None:
        if self._times and path.endswith("/87"):
            self._times -= 1
            remove_empty(os.path.dirname(path), up_to=self._base)
        self._mkdir(path, mode)


@pytest.mark.parametrize("sync", [False, True])
def test_a_parent_that_is_removed_as_empty_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sync: bool
) -> None:
    monkeypatch.setattr(os, "mkdir", Remover(tmp_path, 2))

    made = make_dir(f"{tmp_path}/acme/web/i1/87", sync=sync)

    assert os.path.isdir(made)


def test_one_that_can_never_be_made_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "mkdir", Remover(tmp_path, ATTEMPTS))

    with pytest.raises(FileNotFoundError):
        make_dir(f"{tmp_path}/acme/web/i1/87")
