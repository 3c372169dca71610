"""A bash that commands are typed into, one text after the other, as a reader of a page does it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

END: Final = "a command has ended with"
COMMAND_S: Final = 60.0
BASH: Final = ("bash", "--norc")


class Shell:
    """See `shell`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def type(self, text: str, *, timeout_s: float = COMMAND_S) -> tuple[int, str]:
        """Run it in the shell; its exit code and all it printed.

        Raises:
            AssertionError: the shell has ended.
            TimeoutError: it takes longer.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # The code is on a line of its own, also after an output without an end of its line.
        ending = f"printf '\\n%s %s\\n' '{END}' $?"
        self._process.stdin.write(f"{{ {text}\n}} </dev/null\n{ending}\n".encode())
        printed = b""
        async with asyncio.timeout(timeout_s):
            while not (line := await self._process.stdout.readline()).startswith(END.encode()):
                assert line, f"the shell ended: {printed!r}"
                printed += line
        output = printed.decode().removesuffix("\n")  # of the echo alone
        return int(line.split()[-1]), output if not output or output[-1] == "\n" else f"{output}\n"


@contextlib.asynccontextmanager
async def shell(
    environment: Mapping[str, str], *, command: Sequence[str] = BASH, directory: str | None = None
) -> AsyncGenerator[Shell]:
    """A shell in a directory, killed in the end; `command` is what becomes it."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(environment),
        cwd=directory,
    )
    try:
        yield Shell(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
