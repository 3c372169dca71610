"""The rows that have to be measured: what somebody promised must not get lost from the table."""

from collections.abc import Iterable, Mapping

from bench.report.rows import Measured

# By group: how the names of its rows with a budget begin.
WANTED: Mapping[str, tuple[str, ...]] = {
    "commands": (
        "command that changes nothing, p50",
        "command that changes something, steps aside, p50",
        "no-op commands through journal, reply and ack",
    ),
    "networks": ("SetupNetwork, new tenant, p50",),
    "packets": ("guest's packet out", "its answer back", "first packet of a flow"),
    "healing": ("nats-server restarts", "connection hangs"),
    "launches": (
        "StartInstance, mini guest, p50",
        "SleepInstance, mini guest, p50",
        "WakeInstance, mini guest, p50",
        "StopInstance, mini guest, p50",
        "StartInstance: CPU of the worker",
        "WakeInstance: CPU of the worker",
    ),
    "warm": (
        "StartInstance, mini guest, warm pool, p50",
        "WakeInstance, mini guest, warm pool, p50",
    ),
    "large": ("WakeInstance, mini guest of 512 MiB, p50",),
    "burst": ("burst of 64 wakes, p99",),
    "warm_burst": ("burst of 64 wakes, warm pool of 64, p99",),
    "footprint": (
        "idle: resident memory",
        "idle: CPU",
        "resident memory per running VM",
        "500 VMs running: CPU",
        "10 foreign nftables changes a second, 40 tenants: CPU",
    ),
    "scrape": ("scrape of /metrics, 1000 instances, p50",),
    "scaling": (
        "no-op, 2000 instances",
        "SetupNetwork, 2000 instances",
        "StartInstance, 2000 instances",
        "SleepInstance, 2000 instances",
        "WakeInstance, 2000 instances",
        "StopInstance, 2000 instances",
        "kill -9 with 1000 VMs in the journal",
    ),
    "crowded": (
        "no-op, 200 guests",
        "SetupNetwork, 200 guests",
        "StartInstance, 200 guests",
        "SleepInstance, 200 guests",
        "WakeInstance, 200 guests",
        "StopInstance, 200 guests",
        "kill -9 with 200 guests",
    ),
}


def not_measured(groups: Iterable[str], measured: Mapping[str, Measured]) -> list[str]:
    """Names of these groups' wanted rows that are not there, or have no budget."""
    return [
        f"{group}: {begin}"
        for group in groups
        for begin in WANTED.get(group, ())
        if not any(
            row.name.startswith(begin) and row.budget is not None
            for row in (measured[group].rows if group in measured else ())
        )
    ]
