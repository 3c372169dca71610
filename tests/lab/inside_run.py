"""Tests that run in the lab, with one boot for a directory: their names and their outcomes."""

import ast
import re
from pathlib import Path

# Of the summary at the end: programs of the lab write between the lines above it.
OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR) \S+::(test_\w+)", re.MULTILINE)
PYTEST = ("python", "-m", "pytest", "-v", "-rap", "--color=no", "-p", "no:cacheprovider")


def names_in(directory: Path) -> list[str]:
    """Names of the test functions, read from the source: importing needs the lab's machine."""
    return [
        node.name
        for file in sorted(directory.glob("test_*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]


def outcomes(output: str, name: str) -> set[str]:
    """How the test, in all its parameters, ended; empty if it was skipped or did not run."""
    return {outcome for outcome, test in OUTCOME.findall(output) if test == name}
