"""`hostd dead` on a real host: letters are listed, shown, sent again and dropped."""

import asyncio
import json
from typing import Any

from schemas import codec
from schemas.envelopes import Command
from schemas.requests import SetupNetwork
from tests.constants import NET
from tests.live_host import LiveHost, live_host
from tests.vm.control.local_cli import hostd

GARBAGE = b"\xc1 no envelope"


async def letters(host: LiveHost, count: int) -> list[dict[str, Any]]:
    """The dead letters, once there are so many."""
    async with asyncio.timeout(30):
        while True:
            result = await hostd(host, "dead", "ls", "--json")
            assert result.exit_code == 0, result.output
            found: list[dict[str, Any]] = json.loads(result.stdout)["dead_letters"]
            if len(found) >= count:
                return found


async def test_a_dead_letter_is_listed_shown_sent_again_and_dropped() -> None:
    async with live_host() as host:
        empty = await hostd(host, "dead", "ls")
        subject = f"{host.subjects.root}.{host.subjects.host_id}.cmd.network.acme"
        await host.publish_raw(subject, GARBAGE)
        (letter,) = await letters(host, 1)
        seq = str(letter["seq"])

        text = await hostd(host, "dead", "show", seq)
        raw = await hostd(host, "dead", "show", seq, "--raw")
        sent = await hostd(host, "dead", "replay", seq, "--json")
        first, second = await letters(host, 2)
        dropped = await hostd(host, "dead", "drop", seq)
        (left,) = await letters(host, 1)
        gone = [await hostd(host, "dead", each, seq) for each in ("show", "replay", "drop")]

        assert empty.stdout == "no dead letters\n"
        assert (letter["lane"], letter["size_bytes"]) == ("network.acme", len(GARBAGE))
        assert letter["reason"]
        assert f"data: {GARBAGE.hex()}" in text.stdout
        assert raw.stdout_bytes == GARBAGE
        assert json.loads(sent.stdout)["subject"] == subject
        assert (first["sha256"], first["id"]) != (second["sha256"], second["id"])
        assert first["sha256"] == second["sha256"] == letter["sha256"]
        assert dropped.exit_code == 0
        assert left["seq"] == second["seq"]
        assert [each.exit_code for each in gone] == [13, 13, 13]


async def test_a_letter_of_another_host_is_not_found() -> None:
    async with live_host() as host:
        command = Command(id="c-1", request=SetupNetwork("acme", NET))
        await host.publish_raw(
            f"{host.subjects.root}.{host.subjects.host_id}.cmd.network.beta",
            codec.encode_command(command),
        )
        (letter,) = await letters(host, 1)

        other = await hostd(host, "dead", "show", str(letter["seq"]), "--host", "another")

        assert letter["lane"] == "network.beta"
        assert other.exit_code == 13
        assert "use --host" in other.stderr
