"""No effect on the host before the command is on disk; a row of the journal is no such effect."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from handlers.mechanism import Durability
from handlers.steps import Steps
from tests.unit.journal.journals import opened


@dataclass(frozen=True, slots=True)
class Spec:
    key: str = "r"


class Stored:
    """Whether the command is on disk."""

    def __init__(self) -> None:
        self.done = False

    async def wait(self) -> None:
        await asyncio.sleep(0)
        self.done = True


class Resources:
    """Resources of the host. `ensure` returns whether the command was on disk by then."""

    name: ClassVar[str] = "resource"
    durability: ClassVar[Durability] = Durability.VOLATILE
    swept: ClassVar[bool] = False

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    async def exists(self, key: str) -> bool:
        return key == "there already"

    async def ensure(self, spec: Spec) -> bool:
        assert spec.key
        return self._stored.done

    async def remove(self, key: str) -> None:
        raise NotImplementedError


class Lasting(Resources):
    """What survives a reboot."""

    durability: ClassVar[Durability] = Durability.DURABLE


class Rows(Resources):
    """Rows of the journal."""

    durability: ClassVar[Durability] = Durability.IMPLIED


@pytest.mark.parametrize("kind", [Resources, Lasting])
async def test_an_effect_on_the_host_waits_for_the_command(
    tmp_path: Path, kind: type[Resources]
) -> None:
    stored = Stored()
    async with opened(tmp_path) as journal:
        steps = Steps("c1", journal.steps, {}, stored=stored.wait)

        assert await steps.ensure(kind(stored), Spec())


async def test_a_row_of_the_journal_does_not_and_the_next_effect_does(tmp_path: Path) -> None:
    stored = Stored()
    async with opened(tmp_path) as journal:
        steps = Steps("c1", journal.steps, {}, stored=stored.wait)

        async def is_stored() -> bool:
            return stored.done

        assert not await steps.ensure(Rows(stored), Spec())
        assert await steps.act("effect", is_stored)
