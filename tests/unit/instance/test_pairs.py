"""docs/pairs.md: every cell of its tables, at every moment that the cell is about."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from handlers.registry import HANDLERS
from schemas.requests import Request
from tests.constants import SLEEP, START
from tests.unit.instance.pairs import (
    COMMANDS,
    DOWN,
    UP,
    WAITS,
    moments,
    run_pair,
    run_superseded,
)

PAGE = Path(__file__).parents[3] / "docs" / "pairs.md"
INSTANCE: Final = ("Start", "Stop", "Sleep", "Sleep, `force`", "Wake", "Destroy")
NETWORK: Final = ("SetupNetwork", "TeardownNetwork")
RUNNING, ASLEEP = (UP, START), (UP, START, SLEEP)


class Pair(NamedTuple):
    """One cell. `state` is what follows the network command's name in the first column."""

    first: str
    state: str
    while_it: str
    second: str
    end: str

    @property
    def before(self) -> Sequence[Request]:
        """What has to run before, so that the pair begins as the page says."""
        if self.first in INSTANCE:
            return {"Start": (UP,), "Wake": ASLEEP}.get(self.first, RUNNING)
        if self.state == "in use":
            return RUNNING
        if self.second == "Start" or self.second in NETWORK:
            return () if self.state == "down" else (UP,)
        return (*ASLEEP, DOWN) if self.state == "down" else ASLEEP

    @property
    def ends(self) -> set[str]:
        """The ends that the cell allows: `a · b or c → d` are two."""
        codes, arrow, status = self.end.replace("hurried", "ok").partition(" → ")
        first, _, seconds = codes.partition(" · ")
        return {f"{first} · {second}{arrow}{status}" for second in seconds.split(" or ")}

    @property
    def ends_waits(self) -> bool:
        """Whether the second command ends the waits of the first for its guest."""
        return self.end.startswith(("hurried", "superseded"))

    def about(self, moment: str, order: Sequence[str]) -> bool:
        """Whether the cell's row is about this moment of the run."""
        for part in self.while_it.split(", "):
            if part in (WAITS, "runs"):
                if (moment == WAITS) is (part == WAITS):
                    return True
                continue
            edge = part.partition(" ")[0]
            names = re.findall("`([^`]+)`", part)
            first, last = (order.index(each) for each in (names[0], names[-1]))
            now = order.index(moment)
            if (
                moment != WAITS
                and {
                    "until": now < first,
                    "from": now >= first,
                    "between": first <= now <= last,
                    "past": now > first,
                }[edge]
            ):
                return True
        return False


def pairs() -> list[Pair]:
    """All cells of the tables whose first column is `earlier`."""
    found: list[Pair] = []
    seconds: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0].startswith("---"):
            seconds = seconds if line.startswith("|") else []
        elif cells[0] == "earlier":
            seconds = cells[2:]
        elif seconds:
            name, state = cells[0], ""
            if name not in COMMANDS:
                name, _, state = name.partition(", ")
            ends = zip(seconds, cells[2:], strict=True)
            found += [Pair(name, state, cells[1], second, end) for second, end in ends]
    return found


PAIRS = pairs()


def label(pair: Pair) -> str:
    parts = (pair.first, pair.state, pair.while_it, pair.second)
    return re.sub(r"\W+", "-", " ".join(part for part in parts if part)).strip("-")


@pytest.mark.parametrize("pair", PAIRS, ids=label)
async def test_a_pair_ends_as_the_page_says(pair: Pair, tmp_path: Path) -> None:
    order = await moments(pair.first, pair.before, tmp_path / "order")
    about = [moment for moment in dict.fromkeys(order) if pair.about(moment, order)]
    assert about
    # Of the ends of steps those at the edges: little differs from one to the next step's beginning.
    inner = {each for each in about[1:-1] if each.startswith("after:")}

    for n, moment in enumerate(each for each in about if each not in inner):
        ahead = order[order.index(moment) :] if pair.ends_waits else ()
        ended = await run_pair(
            pair.first,
            moment,
            pair.second,
            tmp_path / f"{n}",
            before=pair.before,
            silent=[each for each in ahead if each.startswith("in:")],
        )
        text = ended.text()
        if "→" not in pair.end:  # refused before or after its reservation: it never ran
            text = text.removesuffix(" → created")
        assert text in pair.ends, moment
        if moment.startswith("in:"):
            assert ended.hurried is pair.end.startswith("hurried"), moment
        assert not ended.first.left_behind
        assert not ended.second.left_behind


WAITING = [pair for pair in PAIRS if pair.while_it == WAITS and "superseded" in pair.end]


@pytest.mark.parametrize("pair", WAITING, ids=label)
async def test_a_superseded_command_that_waits_is_answered_before_its_lane_is_free(
    pair: Pair, tmp_path: Path
) -> None:
    reply, busy = await run_superseded(pair.first, pair.second, tmp_path / "j", before=pair.before)

    assert (reply.code.value, reply.attempts, reply.detail["by"]) == ("superseded", 0, "second")
    assert busy


def test_every_pair_of_commands_is_in_the_tables() -> None:
    named = {(pair.first, pair.second) for pair in PAIRS}

    assert {type(request) for request in COMMANDS.values()} == HANDLERS.keys()
    assert named == {(first, second) for first in COMMANDS for second in COMMANDS}


@pytest.mark.parametrize(
    ("first", "state"), dict.fromkeys((pair.first, pair.state) for pair in PAIRS)
)
async def test_the_rows_of_a_command_are_about_each_of_its_moments_once(
    first: str, state: str, tmp_path: Path
) -> None:
    mine = [pair for pair in PAIRS if (pair.first, pair.state) == (first, state)]
    for second in dict.fromkeys(pair.second for pair in mine):
        rows = [pair for pair in mine if pair.second == second]
        order = await moments(first, rows[0].before, tmp_path / label(rows[0]))

        for moment in order:
            assert sum(pair.about(moment, order) for pair in rows) == 1, (second, moment)
