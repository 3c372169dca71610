"""The kinds of tests, one directory each, the slowest last."""

from pathlib import Path
from typing import Final

import pytest

KINDS: Final = ("unit", "contract", "kernel", "broker", "page", "vm", "crash", "lab")


def is_whole_suite(config: pytest.Config) -> bool:
    """Whether the caller asked for every kind."""
    return set(KINDS) <= {Path(arg).name for arg in config.args}
