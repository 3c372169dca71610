"""The end of a VMM's log, for replies and events about its failure."""

import contextlib

from handlers.errors import Failure, Superseded
from handlers.interfaces import Host
from schemas.records import InstanceRecord

LOG_TAIL_BYTES = 4096


async def log_tail(record: InstanceRecord, host: Host) -> str:
    """The last 4 KiB of the VMM's log of the record's launch."""
    log = await host.jails.read_log(record.ref, record.launch)
    return log[-LOG_TAIL_BYTES:].decode(errors="replace")


async def add_log(failure: Failure, record: InstanceRecord, host: Host) -> None:
    """Add the end of the VMM's log to the failure's detail, if the log can be read."""
    if isinstance(failure, Superseded):
        return
    with contextlib.suppress(Failure, OSError):  # the failure itself matters more
        failure.detail.setdefault("vmm_log", await log_tail(record, host))
