"""The picture of the demo in README.md: what it printed, as an SVG without anything outside of it.

.venv/bin/hostd demo | .venv/bin/python -m tests.demo_picture > docs/images/demo.svg
"""

import sys
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

CHAR, LINE, MARGIN = 7.8, 20, 16  # pixels of a character of 13 px, of a line, around all
STYLE: Final = """\
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre; fill: #1f2328 }
rect { fill: #f6f8fa; stroke: #d1d9e0 }
.name { font-weight: 600 } .time { fill: #0550ae } .end { fill: #116329; font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } rect { fill: #151b23; stroke: #3d444d }
  .time { fill: #79c0ff } .end { fill: #7ee787 }
}"""
NAME_ENDS, TIME_ENDS = 23, 32  # columns, as in worker.demo.progress


def picture(printed: Sequence[str]) -> str:
    """The SVG of the lines that `hostd demo` printed."""
    typed = "hostd demo --guest mini" if "guest: mini" in printed[0] else "make demo"
    lines = [f"# {typed}", *printed]
    width = max(len(line) for line in lines) * CHAR + 2 * MARGIN
    height = len(lines) * LINE + 2 * MARGIN
    rows = "\n".join(
        f'<text x="{MARGIN}" y="{MARGIN + number * LINE + 14}">{_spans(line)}</text>'
        for number, line in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}"'
        f' width="{width:.0f}" height="{height}" role="img" aria-labelledby="title">\n'
        f'<title id="title">What the demo prints</title>\n<style>\n{STYLE}\n</style>\n'
        f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1}" rx="6"/>\n'
        f"{rows}\n</svg>\n"
    )


def _spans(line: str) -> str:
    if not line.startswith("  "):
        kind = "end" if line.startswith("Demo passed") else "name"
        return f'<tspan class="{kind}">{escape(line)}</tspan>'
    name, time, facts = line[:NAME_ENDS], line[NAME_ENDS:TIME_ENDS], line[TIME_ENDS:]
    return (
        f'<tspan class="name">{escape(name)}</tspan>'
        f'<tspan class="time">{escape(time)}</tspan>{escape(facts)}'
    )


def main() -> None:
    """Lines of the demo on stdin, the SVG on stdout."""
    sys.stdout.write(picture(sys.stdin.read().splitlines()))


if __name__ == "__main__":
    main()
