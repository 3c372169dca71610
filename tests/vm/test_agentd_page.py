"""docs/agentd.md: its programs are executed, its commands typed in the order of the page."""

from pathlib import Path

import pytest

from schemas.codes import Code
from tests.console import blocks
from tests.live_host import live_host
from tests.vm.runbooks.operator import operator_of
from worker.client import errors

PAGE = Path(__file__).parents[2] / "docs" / "agentd.md"
TEXT = PAGE.read_text(encoding="utf-8")
URL = "nats://127.0.0.1:4222"


async def test_the_first_hour_of_an_agentds_author() -> None:
    programs = [block for block in blocks(PAGE) if block.language == "python"]
    others = "test_a_command_is_sent_with_the_nats_command_by_copying"
    own = {block.language for block in blocks(PAGE) if block.by != others and block.is_code}
    assert own == {"python", "console"}
    async with live_host(host_id="h1", cell="default") as host:
        words = {URL: host.settings.nats.url}
        async with operator_of(host, words=words) as operator:
            for program in programs:
                file = Path(host.directory, program.mark)
                file.write_text(operator.here(program.text), encoding="utf-8")
            await operator.follow(PAGE)
        assert host.vm_pids() == []


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_the_page_says_what_to_do_for_each_code(code: Code) -> None:
    refusal = errors.REFUSALS[code]

    assert f"| `{code}` `{refusal.__name__}` | {refusal.act}" in TEXT
