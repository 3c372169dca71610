"""Unit tests call no program but this Python: what a machine has installed changes no verdict."""

import pytest


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH on which there is nothing."""
    monkeypatch.setenv("PATH", "/nonexistent")
