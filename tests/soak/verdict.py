"""After the load: was each command answered once, is everything gone, did nothing grow."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from schemas import codec
from schemas.codes import Code
from schemas.requests import Error
from tests.live_host import LiveHost
from tests.soak.load import Ledger

GONE_S = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`failures` is empty if the gate is passed. `faulted` are the texts of host faults, for the
    reader: a VMM that is killed during a command may well be one."""

    failures: list[str]
    codes: dict[str, int]
    faulted: list[str]


async def judge(
    host: LiveHost, ledger: Ledger, before: dict[str, int], growth: list[str]
) -> Verdict:
    """Read the streams and the host."""
    failures = [f"{each} was not answered in time" for each in ledger.unanswered]
    replies = [
        codec.decode_reply(data) for _, _, data in await host.kept(host.subjects.replies_stream)
    ]
    answered = Counter(reply.id for reply in replies)
    failures += wrong_counts("replies", answered, ledger)
    events = [
        codec.decode_event(data) for _, _, data in await host.kept(host.subjects.events_stream)
    ]
    ends = Counter(str(e.command_id) for e in events if e.kind == "command")
    failures += wrong_counts("events of its end", ends, ledger)
    numbers = [event.seq for event in events]
    if numbers != list(range(1, len(numbers) + 1)):
        failures.append("the events' numbers have a gap or a repetition")
    internal = [reply.id for reply in replies if reply.code is Code.INTERNAL]
    failures += [f"{each} was answered internal" for each in internal]
    failures += [
        f"{reply.id} left behind {list(reply.left_behind)}"
        for reply in replies
        if reply.id.startswith("soak") and reply.left_behind
    ]
    failures += await residue(host, before)
    faulted = [
        f"{reply.id}: {reply.response.message}"
        for reply in replies
        if reply.code is Code.HOST_FAULT and isinstance(reply.response, Error)
    ]
    codes = Counter(reply.code.value for reply in replies)
    return Verdict(failures + growth, dict(codes), faulted)


def wrong_counts(what: str, counts: Counter[str], ledger: Ledger) -> list[str]:
    wrong = {each: counts[each] for each in ledger.sent if counts[each] != 1}
    found = [f"{each} has {count} {what}, want 1" for each, count in wrong.items()]
    foreign = set(counts) - set(ledger.sent)
    return found + [f"{each} has {what} and was never sent" for each in sorted(foreign)]


async def residue(host: LiveHost, before: dict[str, int]) -> list[str]:
    """What is there that was not before, once the background had its time."""
    end = time.monotonic() + GONE_S
    now: dict[str, Any] = await host.inventory()
    while now != before and time.monotonic() < end:
        await asyncio.sleep(0.5)
        now = await host.inventory()
    return [
        f"{now[kind]} {kind}, before {before[kind]}" for kind in before if now[kind] != before[kind]
    ]
