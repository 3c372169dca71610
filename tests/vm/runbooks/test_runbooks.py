"""Each page of docs/runbooks leads a real host out of the state that it is about."""

from pathlib import Path

import pytest

from tests.vm.runbooks.faults import FAULTS

PAGES = Path(__file__).parents[3] / "docs" / "runbooks"


@pytest.mark.parametrize("page", sorted(FAULTS))
async def test_a_page_leads_out_of_its_state(page: str, tmp_path: Path) -> None:
    async with FAULTS[page](tmp_path) as operator:
        await operator.follow(PAGES / f"{page}.md")
