"""`python -m tests.soak --minutes 30`: exits with 1 if the gate is not passed.

The report goes to stdout and, with all samples and faults, to `build/soak.json`. With the same
seed the commands and faults are drawn in the same order; their times depend on the machine.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tests.guests.cache import BUILD
from tests.guests.namespace import own_network
from tests.soak.cluster import SoakHost
from tests.soak.faults import Faults, passed
from tests.soak.gauges import SLACK, Gauges
from tests.soak.load import INSTANCES, TENANTS, Load
from tests.soak.verdict import Verdict, judge

REPORT = Path(BUILD, "soak.json")


async def soak(minutes: float, seed: int) -> tuple[dict[str, Any], Verdict]:
    """One run on a host of its own; everything is removed afterwards."""
    with own_network():
        host = SoakHost()
        try:
            await host.cluster.start()
            await host.cluster.provision(host.settings, host.subjects)
            return await under_load(host, minutes, seed)
        except BaseException:
            print(host.log()[-4000:] if host.worker is not None else "", file=sys.stderr)
            raise
        finally:
            await host.close()


async def under_load(host: SoakHost, minutes: float, seed: int) -> tuple[dict[str, Any], Verdict]:
    before = await host.inventory()
    faults = Faults(host, random.Random(f"{seed} faults"))
    load = Load(host, random.Random(f"{seed} load"))
    gauges = Gauges(faults)
    await faults.start_worker()
    measuring = asyncio.create_task(gauges.run(load.ledger.sent))
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            group.create_task(faults.run(load.ending))
            group.create_task(progress(load, faults))
            await passed(load.ending, minutes * 60)
            load.ending.set()
    finally:
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)
    await load.end()
    await host.wait_unfinished(0, timeout_s=120)
    await host.stop_worker()  # it sends what is left
    verdict = await judge(host, load.ledger, before, gauges.growth())
    return report(seed, load, faults, gauges, verdict), verdict


async def progress(load: Load, faults: Faults) -> None:
    while not await passed(load.ending, 30):
        line = f"{len(load.ledger.sent)} commands, {sum(faults.counts.values())} faults"
        print(f"soak: {time.monotonic() - faults.began:.0f} s: {line}", file=sys.stderr)


def report(
    seed: int, load: Load, faults: Faults, gauges: Gauges, verdict: Verdict
) -> dict[str, Any]:
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - faults.began, 1),
        "tenants": TENANTS,
        "instances": TENANTS * INSTANCES,
        "commands": dict(Counter(request.kind for request in load.ledger.sent.values())),
        "published_again": load.ledger.copies,
        "codes": verdict.codes,
        "faults": dict(faults.counts),
        "failures": verdict.failures,
        "faulted": verdict.faulted,
        "samples": [asdict(sample) for sample in gauges.samples],
        "fault_log": faults.log,
    }


def show(found: dict[str, Any]) -> None:
    """The report as text: what was done, what it came to, what the worker used."""
    print(f"seed {found['seed']}, {found['seconds']} s, {sum(found['commands'].values())} commands")
    for name in ("commands", "codes", "faults"):
        print(f"{name}: " + ", ".join(f"{key} {n}" for key, n in sorted(found[name].items())))
    third = max(1, len(found["samples"]) // 3)
    for name in (*SLACK, "journal_bytes", "wal_bytes"):
        parts = found["samples"][:third], found["samples"][-third:]
        first, last = (median([sample[name] for sample in part] or [0]) for part in parts)
        print(f"{name}: {first:g} in the first third, {last:g} in the last")
    for text in found["faulted"]:
        print(f"host fault: {text}")
    for failure in found["failures"]:
        print(f"FAILED: {failure}")
    print("not passed" if found["failures"] else "passed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args()
    found, verdict = asyncio.run(soak(given.minutes, given.seed))
    REPORT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)
    print(f"report: {REPORT}")
    return 1 if verdict.failures else 0


if __name__ == "__main__":
    sys.exit(main())
