"""The `console` blocks of a page: commands as typed, and what they print.

    ```console
    # hostd drain
    ...
    [exit code 15]
    ```

`# ` is root's prompt; a line that ends in a backslash goes on in the next one. What follows a
command is all that it prints, with standard error: a line `...` is any number of lines, `...`
within a line is any text. A last line `[exit code N]` is the code, which is 0 otherwise. After
```` ```console until ```` each command is run again until it prints what follows: it only looks,
or may be repeated without harm.
A block that cannot be executed says why: ```` ```console not executed: <reason> ````.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FENCE: Final = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence) *$", re.MULTILINE | re.DOTALL
)
EXIT: Final = re.compile(r"\[exit code (\d+)\]")
PROMPT: Final = "# "
NOT_EXECUTED: Final = "not executed:"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: `info` is what follows the fence, `line` where the fence is."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def mark(self) -> str:
        """What follows the language."""
        return self.info.partition(" ")[2].strip()

    @property
    def reason(self) -> str:
        """Why it is not executed; empty if it is."""
        return self.mark.removeprefix(NOT_EXECUTED).strip() if NOT_EXECUTED in self.mark else ""


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a block, and what the page promises of it."""

    block: Block
    text: str
    expected: tuple[str, ...]
    code: int

    @property
    def repeated(self) -> bool:
        """Whether it is run again until it prints what is expected."""
        return self.block.mark == "until"

    def matches(self, code: int, output: str) -> bool:
        return code == self.code and bool(pattern(self.expected).fullmatch(output))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start()].count("\n") + 1, found["info"].strip(), found["text"])
        for found in FENCE.finditer(text)
    ]


def commands(page: Path) -> list[Command]:
    """The commands of all console blocks of a page, in its order."""
    shown = [block for block in blocks(page) if block.language == "console" and not block.reason]
    return [command for block in shown for command in _commands(block)]


def _commands(block: Block) -> Iterator[Command]:
    lines = block.text.splitlines()
    if not lines or not lines[0].startswith(PROMPT):
        raise ValueError(f"{block.page}:{block.line}: expected a command after '{PROMPT}' first")
    while lines:
        typed = [lines.pop(0).removeprefix(PROMPT)]
        while typed[-1].endswith("\\"):
            typed.append(lines.pop(0))
        expected: list[str] = []
        while lines and not lines[0].startswith(PROMPT):
            expected.append(lines.pop(0))
        code = 0
        if expected and (found := EXIT.fullmatch(expected[-1])):
            code = int(found[1])
            expected.pop()
        yield Command(block, "\n".join(typed), tuple(expected), code)


def pattern(expected: tuple[str, ...]) -> re.Pattern[str]:
    """What the output of a command has to match as a whole."""
    lines = (
        r"(?:.*\n)*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r" *\n"
        for line in expected
    )
    return re.compile("".join(lines))
