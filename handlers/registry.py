"""Command type -> handler, and the mechanisms that a step row may name: two explicit lists."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from handlers.instance.destroy import destroy_instance
from handlers.instance.reservations import Reservations
from handlers.instance.sleep import sleep_instance
from handlers.instance.snapshot_steps import (
    Drains,
    Pauses,
    SnapshotDrafts,
    SnapshotUses,
    Transitions,
)
from handlers.instance.start import start_instance
from handlers.instance.stop import stop_instance
from handlers.instance.wake import wake_instance
from handlers.interfaces import Host
from handlers.mechanism import Removable
from handlers.network import setup_network, teardown_network
from handlers.steps import Done, Steps
from schemas.requests import (
    DestroyInstance,
    SetupNetwork,
    SleepInstance,
    StartInstance,
    StopInstance,
    TeardownNetwork,
    WakeInstance,
)

# The first argument is the request of the type that the handler is listed under.
Handler = Callable[[Any, Steps, Host], Awaitable[Done]]

HANDLERS: Final[Mapping[type, Handler]] = {
    StartInstance: start_instance,
    StopInstance: stop_instance,
    SleepInstance: sleep_instance,
    WakeInstance: wake_instance,
    DestroyInstance: destroy_instance,
    SetupNetwork: setup_network,
    TeardownNetwork: teardown_network,
}


def mechanisms(host: Host) -> Mapping[str, Removable]:
    """All mechanisms that a step row may name, by name."""
    known: tuple[Removable, ...] = (
        Reservations(host),
        Transitions(host),
        Drains(host),
        Pauses(host),
        SnapshotDrafts(host),
        SnapshotUses(host),
        host.bridges,
        host.tenant_rules,
        host.pins,
        host.taps,
        host.artifacts,
        host.data_disks,
        host.cgroups,
        host.jails,
        host.vmms,
    )
    return {mechanism.name: mechanism for mechanism in known}
