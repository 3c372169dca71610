"""Where an instance stands: journal and kernel decide, `instance.json` only tells what is new."""

from dataclasses import dataclass

from msgspec.structs import replace

from handlers.errors import Conflict, Failure, NotFound
from handlers.interfaces import Host
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef

RESTING = frozenset({Status.CREATED, Status.READY, Status.STOPPED, Status.FAILED})
FRESH = frozenset({Status.CREATED, Status.READY})


@dataclass(frozen=True, slots=True)
class InstanceState:
    """`record` is the journal's, or one made from the file for an instance never launched here."""

    record: InstanceRecord

    @property
    def status(self) -> Status:
        """What decides: in the midst of a command the status before it, unless past its point.

        With its snapshot consumed a guest counts as having run.
        """
        before = self.record.before
        if before is None:
            return self.record.status
        if self.record.consumed and before.status is Status.SLEEPING:
            return Status.RUNNING
        return before.status

    def refuse_half_done(self, command_id: str) -> None:
        """Raise if another command ended past its point of no return without getting through."""
        record = self.record
        if record.before is not None and record.command_id != command_id:
            raise Conflict(
                f"instance {record.ref} is half-way {record.status}: send that command again, "
                "or StopInstance or DestroyInstance",
                detail={"status": str(record.status)},
            )

    def refuse_unknown(self) -> None:
        if self.status is Status.UNKNOWN:
            raise Conflict(
                f"instance {self.record.ref} is quarantined: its VMM could not be proven; "
                "see docs/operations.md",
                detail={"status": str(self.status)},
            )

    def conflict(self, what: str) -> Failure:
        return Conflict(
            f"instance {self.record.ref} is {self.status}: cannot {what}",
            detail={"status": str(self.status)},
        )


async def read_state(ref: InstanceRef, host: Host, now_ms: int) -> InstanceState:
    """Read journal, tombstone and file of an instance.

    A file that says running, warm or sleeping without a record of hostd's counts as stopped,
    unless a manifest of hostd's proves that it sleeps: then the journal was lost meanwhile.

    Raises:
        NotFound: neither journal nor files know it.
        Invalid: `instance.json` is malformed or hostile.
    """
    record = host.records.instance(ref)
    if record is not None:
        # The files are not even looked at: nothing in them must keep a VM from its Stop.
        return InstanceState(record)
    try:
        file = await host.shared.instance(ref)
    except NotFound as error:
        raise NotFound(f"instance {ref} has no instance.json", path="instance.json") from error
    status = Status.STOPPED
    if file.status in FRESH:
        status = Status(file.status)
    record = InstanceRecord(ref=ref, status=status, since_ms=now_ms)
    tombstone = host.records.tombstone(ref)
    if tombstone is not None:
        # Launch numbers are never used twice, and a kept disk is still the one that hostd made.
        disk = tombstone.disk if tombstone.kept_volumes else None
        record = replace(record, launch=tombstone.launch, disk=disk)
    asleep = await host.snapshots.read(ref)
    if asleep is not None:
        record = replace(
            record,
            status=Status.SLEEPING,
            launch=asleep.launch,
            snapshot=asleep.number,
            revision=asleep.revision,
            vcpus=asleep.vcpus,
            mem_mib=asleep.mem_mib,
            disk=asleep.disk,
        )
    return InstanceState(record)


def final_record(record: InstanceRecord, status: Status, now_ms: int) -> InstanceRecord:
    """The record at the end of a command: nothing of a run left in it."""
    return replace(record, status=status, since_ms=now_ms, before=None, command_id=None)
