"""The picture of the demo shows every line, in the reader's light or dark scheme."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from tests.demo_picture import picture

SVG = "{http://www.w3.org/2000/svg}"
COMMITTED = Path(__file__).parents[3] / "docs/images/demo.svg"
PRINTED = [
    "hostd demo, on this machine's KVM, guest: linux",
    "  sleep                814.7 ms   sleeping, <128 MiB> & more",
    "Demo passed on this machine's KVM: 1 steps, 11.3 s.",
]


def test_each_line_is_shown_as_printed() -> None:
    root = ET.fromstring(picture(PRINTED))

    assert ["".join(text.itertext()) for text in root.iter(f"{SVG}text")] == [
        "# make demo",
        *PRINTED,
    ]


def test_the_committed_picture_is_of_a_demo_that_passed_and_needs_nothing_else() -> None:
    text = COMMITTED.read_text(encoding="utf-8")
    shown = ["".join(each.itertext()) for each in ET.fromstring(text).iter(f"{SVG}text")]

    assert text == picture(shown[1:])
    assert shown[-1].startswith("Demo passed")
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"(?:href|src|url)\b|https?://(?!www\.w3\.org/2000/svg)", text) == []
