"""A worker that waits for little, so that a test need not: `python -m tests.vm.runbooks.hurried`.

With `HURRIED_CALLS` set a call into the kernel hangs after 3 s. The reconciler and the sweep look
every second. While the process lives whose pid is in `<paths.run>/wedge`, a call of nftables that
changes something does not return, as if that program held the kernel's lock.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from handlers.host.linux import kernel_thread

if "HURRIED_CALLS" in os.environ:
    kernel_thread.CALL_S = 3.0  # type: ignore[misc]  # before the modules that read it

from handlers.host.net.nft import nftables
from worker.cli.main import main
from worker.reconcile import reconciler, sweep, vmm_versions

AGAIN_S = 0.01


def holds(wedge: str) -> bool:
    """Whether the program that wedges nftables is there."""
    try:
        with open(wedge, encoding="ascii") as file:
            return os.path.exists(f"/proc/{file.read()}/exe")  # a zombie has none
    except FileNotFoundError:
        return False


def wedged(change: Callable[..., Any], wedge: str) -> Callable[..., Any]:
    """The call, once nothing wedges it."""

    def call(*args: Any, **options: Any) -> Any:
        while holds(wedge):
            time.sleep(AGAIN_S)
        return change(*args, **options)

    return call


if __name__ == "__main__":
    reconciler.PASS_EVERY_S = 1.0
    reconciler.SCAN_SHARE = 1.0  # a slow machine looks every second as well
    sweep.SIGHTINGS_S = 1.0
    vmm_versions.CHECK_S = 1.0  # type: ignore[misc]
    where = os.path.join(os.environ["HOSTD_PATHS_RUN"], "wedge")
    nftables.Tables.change = wedged(nftables.Tables.change, where)  # type: ignore[method-assign]
    main(["run"], prog_name="hostd")
