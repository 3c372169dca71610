"""`python -m bench`: measure, print a table, write `bench/results.json`. Needs root."""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

from bench.groups import GROUPS
from bench.report import machine, rows, table
from bench.report.rows import Measured
from bench.report.wanted import not_measured

GROUP_TIMEOUT_S = 600
CLEANUP_TIMEOUT_S = 60


def measure_here(name: str, rounds: int | None) -> int:
    """One group in this process; its rows go to stdout as one line of JSON."""
    group = GROUPS[name]
    measured = asyncio.run(_measured(name, rounds or group.rounds))
    print(json.dumps(asdict(measured)))
    return 0


async def _measured(name: str, rounds: int) -> Measured:
    return await GROUPS[name].measure(rounds)


def measure_apart(name: str, rounds: int | None) -> Measured | None:
    """One group in a process of its own: separate network namespace, threads and memory.

    Its progress and its traceback go to stderr; None if it failed or did not end in time, which
    also gets it the time to remove what it made.
    """
    began = time.monotonic()
    print(f"measuring {name} ...", end="", flush=True)
    command = [sys.executable, "-m", "bench", "--within", name]
    command += ["--rounds", str(rounds)] if rounds else []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            output, _ = process.communicate(timeout=GROUP_TIMEOUT_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            output = _interrupted(process)
            if isinstance(error, KeyboardInterrupt):
                raise
    took = f"{time.monotonic() - began:.0f} s"
    if process.returncode:
        print(f" FAILED after {took}", flush=True)
        return None
    print(f" {took}", flush=True)
    return rows.measured_of(json.loads(output.splitlines()[-1]))


def _interrupted(process: subprocess.Popen[bytes]) -> bytes:
    """As Ctrl-C: the group's event loop is cancelled and cleans up."""
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=CLEANUP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    return output


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help="also update docs/benchmarks.md")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all")
    parser.add_argument("--rounds", type=int, help="fewer rounds for a quick look; writes no file")
    parser.add_argument("--within", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names: list[str] = options.groups or list(GROUPS)
    if unknown := set(names) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        print("bench: run as root: it starts VMs and sets up networks", file=sys.stderr)
        return 1
    if options.within:
        return measure_here(options.within, options.rounds)
    facts = machine.describe()
    print("\n".join(facts), flush=True)
    measured: dict[str, Measured] = {}
    failed: list[str] = []
    for name in names:
        each = measure_apart(name, options.rounds)
        if each is None:
            failed.append(name)
        else:
            measured[name] = each
    results = [each for group in measured.values() for each in group.rows]
    spans = [each for group in measured.values() for each in group.spans]
    print(table.table(results))
    for line in table.timeline(spans):
        print("{:50} {:>8} {:>8}".format(*line))
    print(f"\n{table.missed(results)}")
    if failed:
        print(f"FAILED: {', '.join(failed)}; the traceback is above")
    lost = not_measured((name for name in names if name not in failed), measured)
    if lost:
        print(f"NOT MEASURED: {'; '.join(lost)}")
    if not options.rounds:
        known = rows.write_results(facts, measured)
        if options.write_docs:
            table.write_docs(facts, {name: known[name] for name in GROUPS if name in known})
    return 1 if failed or lost else 0


if __name__ == "__main__":
    sys.exit(main())
