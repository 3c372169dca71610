"""What a command finds out before its steps, beside what else it reads."""

from pathlib import Path
from typing import ClassVar

from handlers.mechanism import Durability
from handlers.steps import Steps
from tests.unit.journal.journals import opened


class Bridges:
    """A kind of resource that exists when its key is in `there`; `asked` for how often it was."""

    name: ClassVar[str] = "bridge"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = True

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.asked = 0

    async def exists(self, key: str) -> bool:
        self.asked += 1
        return key in self.there

    async def remove(self, key: str) -> None:
        self.there.discard(key)


async def test_what_was_looked_at_is_announced_without_another_look(tmp_path: Path) -> None:
    bridges = Bridges()
    bridges.there = {"b1"}
    async with opened(tmp_path) as journal:
        steps = Steps("c1", journal.steps, {})

        await steps.look((bridges, "b1"), (bridges, "b2"))
        await steps.announce((bridges, "b1"), (bridges, "b2"))

        assert bridges.asked == 2
        rows = journal.steps.rows("c1")
        assert [(row.key, row.existed) for row in rows] == [("b1", True), ("b2", False)]


async def test_an_announcement_looks_for_what_was_not_looked_at(tmp_path: Path) -> None:
    bridges = Bridges()
    bridges.there = {"b2"}
    async with opened(tmp_path) as journal:
        steps = Steps("c1", journal.steps, {})

        await steps.look((bridges, "b1"))
        await steps.announce((bridges, "b1"), (bridges, "b2"))

        rows = journal.steps.rows("c1")
        assert [(row.key, row.existed) for row in rows] == [("b1", False), ("b2", True)]


async def test_a_look_counts_for_one_announcement(tmp_path: Path) -> None:
    bridges = Bridges()
    async with opened(tmp_path) as journal:
        steps = Steps("c1", journal.steps, {})
        await steps.look((bridges, "b1"))
        await steps.announce((bridges, "b1"))

        bridges.there = {"b1"}  # before the next attempt
        await steps.announce((bridges, "b1"))

        assert bridges.asked == 2
