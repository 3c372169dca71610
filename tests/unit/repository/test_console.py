"""Commands and what they print are read from a page as it shows them."""

from pathlib import Path

import pytest

from tests.console import blocks, commands

PAGE = """\
Text, and a block of another language:

```toml
[vmm]
```

```console
# hostd ping
ok: host, ...
...
# one \\
  --two
[exit code 3]
```

```console until
# quiet
```

```console not executed: no such program
# iostat
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_commands_are_read_with_output_and_exit_code(page: Path) -> None:
    ping, two, quiet = commands(page)

    assert (ping.text, ping.expected, ping.code) == ("hostd ping", ("ok: host, ...", "..."), 0)
    assert (two.text, two.expected, two.code) == ("one \\\n  --two", (), 3)
    assert (ping.repeated, quiet.repeated) == (False, True)
    assert [(block.line, block.reason) for block in blocks(page)] == [
        (3, ""),
        (7, ""),
        (16, ""),
        (20, "no such program"),
    ]


@pytest.mark.parametrize(
    ("code", "output", "matches"),
    [
        (0, "ok: host, 1 ms\n", True),
        (0, "ok: host, 1 ms\n  version: 1\n  more\n", True),
        (1, "ok: host, 1 ms\n", False),
        (0, "error\nok: host, 1 ms\n", False),
        (0, "", False),
    ],
)
def test_the_whole_output_is_compared(page: Path, code: int, output: str, *, matches: bool) -> None:
    (ping, *_) = commands(page)

    assert ping.matches(code, output) is matches


def test_a_command_without_output_prints_nothing(page: Path) -> None:
    quiet = commands(page)[-1]

    assert quiet.matches(0, "")
    assert not quiet.matches(0, "something\n")


def test_a_block_begins_with_a_command(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("```console\nhostd ping\n```\n")

    with pytest.raises(ValueError, match=r"page\.md:1: expected a command"):
        commands(path)
