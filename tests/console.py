"""The blocks of a page that are commands, and who executes them.

A `console` block shows commands as typed, and what they print:

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

An `sh` block is to be copied as a whole. A `text` block right after it is what it prints. A comment
before the block, or one for all blocks of a page, says who executes it, or why nobody does:

    <!-- executed by test_the_name_of_a_test -->
    <!-- not executed: <reason> -->
    <!-- every block is executed by test_the_name_of_a_test -->
"""

import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FENCE: Final = re.compile(
    r"^(?: *<!-- (?P<comment>[^\n]*) -->\n+)?"
    r"(?P<indent> *)(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^ *(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
EXIT: Final = re.compile(r"\[exit code (\d+)\]")
PROMPT: Final = "# "
NOT_EXECUTED: Final = "not executed:"
BY: Final = re.compile(r"executed by (\w+)")
EVERY: Final = re.compile(r"^<!-- every block is executed by (\w+) -->$", re.MULTILINE)
LANGUAGES: Final = ("sh", "bash", "shell", "console", "python")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: `info` is what follows the fence, `line` where the fence is.

    `comment` is what is before it, `by` the test that executes it, or empty.
    """

    page: Path
    line: int
    info: str
    text: str
    comment: str = ""
    by: str = ""

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
        for said in (self.mark, self.comment):
            if said.startswith(NOT_EXECUTED):
                return said.removeprefix(NOT_EXECUTED).strip()
        return ""

    @property
    def is_code(self) -> bool:
        """Whether a reader may want to execute it."""
        return self.language in LANGUAGES


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
    every = EVERY.search(text)
    found: list[Block] = []
    for match in FENCE.finditer(text):
        comment = match["comment"] or ""
        by = BY.fullmatch(comment) or every
        block = Block(
            page,
            text[: match.start("fence")].count("\n") + 1,
            match["info"].strip(),
            textwrap.dedent(match["text"]),
            comment,
            by[1] if by else "",
        )
        found.append(block)
    return found


@dataclass(frozen=True, slots=True)
class Step:
    """A block that is copied, and what it prints; None if the page does not say."""

    block: Block
    expected: tuple[str, ...] | None
    chapter: str

    def matches(self, output: str) -> bool:
        return self.expected is None or bool(pattern(self.expected).fullmatch(output))


def steps(page: Path, by: str) -> list[Step]:
    """The `sh` blocks of a page that a test executes, in its order. `chapter` is the heading above.

    Raises:
        ValueError: there are none.
    """
    text = page.read_text(encoding="utf-8").splitlines()
    found: list[Step] = []
    shown = blocks(page)
    for block, after in zip(shown, [*shown[1:], None], strict=True):
        if block.language != "sh" or block.reason or block.by != by:
            continue
        end = block.line + block.text.count("\n") + 1  # the line of the closing fence
        prints = (
            after is not None
            and after.language == "text"
            and not "".join(text[end : after.line - 1]).strip()
        )
        headings = [line for line in text[: block.line] if line.startswith("## ")]
        chapter = headings[-1].removeprefix("## ") if headings else ""
        expected = tuple(after.text.splitlines()) if after is not None and prints else None
        found.append(Step(block, expected, chapter))
    if not found:
        raise ValueError(f"{page}: no block is executed by {by}")
    return found


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


def main() -> None:
    """List the blocks of the pages named, each with who executes it, or why nobody does."""
    for page in map(Path, sys.argv[1:]):
        for block in blocks(page):
            if block.is_code:
                what = f"executed by {block.by}" if block.by else f"not executed: {block.reason}"
                print(f"{page}:{block.line}: {what}")


if __name__ == "__main__":
    main()
