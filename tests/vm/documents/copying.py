"""A reader who copies the blocks of a page into one shell, in order."""

from tests.console import Step
from tests.shell import Shell

FAILED = "/run/failed-commands"
BLOCK_S = 120.0
WATCH = f"set -E; trap 'echo \"$BASH_COMMAND: exit code $?\" >> {FAILED}' ERR; : > {FAILED}"


async def begin(shell: Shell) -> None:
    """From now on the shell notes each command that fails and that no other one looks after."""
    assert await shell.type(WATCH) == (0, "")


async def copy(step: Step, shell: Shell) -> str:
    """Copy a block into the shell; returns what it printed.

    Raises:
        AssertionError: it prints something else than the page says, or a command of it failed.
    """
    code, output = await shell.type(step.block.text, timeout_s=BLOCK_S)
    _, failed = await shell.type(f"cat {FAILED}")
    place = f"{step.block.page.name}:{step.block.line}"
    told = f"{place}\n{step.block.text}-- printed\n{output}-- failed\n{failed}"
    assert (code, failed) == (0, ""), told
    assert step.matches(output), told + "-- the page says\n" + "\n".join(step.expected or ())
    return output
