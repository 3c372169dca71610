"""The kinds of tests, one directory each, the slow ones last."""

from pathlib import Path
from typing import Any, Final, cast

import pytest

KINDS: Final = ("unit", "contract", "kernel", "broker", "page", "lab", "vm", "crash")


def is_whole_suite(config: pytest.Config) -> bool:
    """Whether the caller asked for every kind."""
    return set(KINDS) <= {Path(arg).name for arg in config.args}


def is_part_of_a_run(config: pytest.Config) -> bool:
    """Whether this process runs a part of the tests (`-n 2`); the first process judges the run."""
    return hasattr(config, "workerinput")


def told_to_the_first(config: pytest.Config) -> dict[str, Any]:
    """What the first process gets from a part when that has ended: see `pytest_testnodedown`."""
    return cast("dict[str, Any]", vars(config)["workeroutput"])
