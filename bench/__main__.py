"""`python -m bench`: measure, print a table, write `bench/results.json`. Needs root."""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

from bench import commands, footprint, launches, machine, networks, rows
from bench.bench_host import bench_host
from bench.rows import Row

GROUPS = ("commands", "networks", "launches", "burst", "footprint", "decoding")
GROUP_TIMEOUT_S = 150


async def measure(group: str) -> list[Row]:
    """One group, in this process."""
    if group == "decoding":
        return commands.measure_decoding()
    async with bench_host() as stage:
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


def measure_apart(group: str) -> list[Row]:
    """One group in a separate process: separate network namespace, threads and memory.

    Its progress goes to stderr.
    """
    began = time.monotonic()
    print(f"measuring {group} ...", end="", flush=True)
    command = [sys.executable, "-m", "bench", "--within", group]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=GROUP_TIMEOUT_S)
    print(f" {time.monotonic() - began:.0f} s", flush=True)
    return [Row(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help="also update docs/benchmarks.md")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--within", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("bench: run as root: it starts VMs and sets up networks", file=sys.stderr)
        return 1
    if options.within:
        print(json.dumps([asdict(each) for each in asyncio.run(measure(options.within))]))
        return 0
    facts = machine.describe()
    print("\n".join(facts), flush=True)
    results = [each for group in options.only for each in measure_apart(group)]
    print(rows.table(results))
    missed = [each.name for each in results if each.ok is False]
    print("\nmissed: " + "; ".join(missed) if missed else "\nall budgets met")
    rows.write_results(results)
    if options.write_docs:
        rows.write_docs(results, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
