"""`python -m bench`: measure, print a table, write `bench/results.json`. As root."""

import argparse
import asyncio
import os
import sys
import time

from bench import commands, footprint, launches, machine, networks, rows
from bench.rows import Row
from bench.world import World, world

GROUPS = ("commands", "networks", "launches", "burst", "footprint", "decoding")


async def measure(groups: list[str]) -> list[Row]:
    """Each group on a host of its own, so that none finds what another left in memory."""
    found: list[Row] = []
    for group in groups:
        began = time.monotonic()
        print(f"measuring {group} ...", flush=True)
        if group == "decoding":
            found += commands.measure_decoding()
        else:
            async with world() as stage:
                found += await _of(group, stage)
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return found


async def _of(group: str, stage: World) -> list[Row]:
    match group:
        case "commands":
            return await commands.measure(stage)
        case "networks":
            return await networks.measure(stage)
        case "launches":
            return await launches.measure(stage)
        case "burst":
            return await launches.measure_burst(stage)
        case "footprint":
            return await footprint.measure(stage)
        case _:
            raise AssertionError(group)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help="also into docs/benchmarks.md")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("bench: needs root: it starts VMs and sets up networks", file=sys.stderr)
        return 1
    facts = machine.describe()
    print("\n".join(facts), flush=True)
    found = asyncio.run(measure(options.only))
    print(rows.table(found))
    missed = [each.name for each in found if each.ok is False]
    print("\nmissed: " + "; ".join(missed) if missed else "\nall budgets are kept")
    rows.write_results(found)
    if options.write_docs:
        rows.write_docs(found, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
