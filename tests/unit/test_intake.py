"""From bytes on a subject to exactly one effect and one reply per id."""

from pathlib import Path

from schemas import codec
from schemas.codes import Code
from schemas.requests import Ok
from tests.fakes.shell import shell, start


async def test_a_command_is_run_answered_and_announced(tmp_path: Path) -> None:
    async with shell(tmp_path / "j") as worker:
        worker.send(start(), reply_to="_INBOX.1")
        reply = await worker.reply()
        await worker.bus.until(events=1, sent=1)
        await worker.bus.until_acked()

        assert (reply.code, reply.response, reply.changed) == (Code.OK, Ok(), True)
        assert worker.machine.things.made == ["acme/web/a1"]
        assert worker.bus.sent_to("_INBOX.1") == [worker.bus.replies()[0].payload]
        assert [(e.seq, e.kind, e.command_id) for e in worker.events()] == [(1, "command", "c1")]


async def test_ten_copies_of_a_command_have_one_effect_and_one_kept_reply(tmp_path: Path) -> None:
    async with shell(tmp_path / "j") as worker:
        for n in range(10):
            worker.send(start(), reply_to=f"_INBOX.{n}")
        await worker.bus.until(replies=1, sent=10)

        assert worker.machine.things.made == ["acme/web/a1"]
        assert worker.machine.runs == [("c1", "StartInstance")]
        assert len(worker.bus.replies()) == 1
        kept = worker.bus.replies()[0].payload
        copies = {data for _, data in worker.bus.sent}
        assert copies == {kept, codec.mark_replayed(kept)}
