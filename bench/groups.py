"""The groups of measurements: each is measured in a process of its own, on hosts of its own."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from bench import (
    burst,
    commands,
    crowded,
    floors,
    footprint,
    healing,
    launches,
    networks,
    packets,
    scaling,
    scrape,
    wake,
)
from bench.bench_host import BenchHost, bench_host
from bench.report.rows import Measured


@dataclass(frozen=True, slots=True)
class Group:
    """`measure` gets the number of rounds; `rounds` is how many there are usually."""

    measure: Callable[[int], Awaitable[Measured]]
    rounds: int


def on_host(
    measure: Callable[[BenchHost, int], Awaitable[Measured]], rounds: int, **options: Any
) -> Group:
    """A group that is measured on one host."""

    async def measured(rounds: int) -> Measured:
        async with bench_host(**options) as bench:
            return await measure(bench, rounds)

    return Group(measured, rounds)


GROUPS: dict[str, Group] = {
    "commands": on_host(commands.measure, commands.ROUNDS),
    "networks": on_host(networks.measure, networks.ROUNDS),
    "packets": Group(packets.measure, packets.ROUNDS),
    "healing": Group(healing.measure, healing.FAULTS),
    "launches": on_host(launches.measure, launches.ROUNDS),
    "warm": on_host(launches.measure_warm, launches.ROUNDS, warm_pool=2),
    "large": on_host(launches.measure_large, launches.LARGE_ROUNDS),
    "burst": on_host(burst.measure, burst.BURSTS),
    "warm_burst": on_host(burst.measure, burst.BURSTS, warm_pool=burst.BURST),
    "footprint": on_host(
        footprint.measure, footprint.INTERVALS, vmm_overhead_mib=footprint.OVERHEAD_MIB
    ),
    "scrape": on_host(scrape.measure, scrape.ROUNDS, metrics=scrape.LISTEN),
    "scaling": Group(scaling.measure, scaling.ROUNDS),
    "crowded": Group(crowded.measure, crowded.ROUNDS),
    "floors": on_host(floors.measure, floors.ROUNDS),
    "wake": on_host(wake.measure, wake.ROUNDS, program="bench.traced"),
    "decoding": Group(commands.measure_decoding, commands.DECODINGS),
}
