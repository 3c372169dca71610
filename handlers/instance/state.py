"""The state of an instance: from the journal; from `instance.json` if the journal has none."""

from dataclasses import dataclass

from msgspec.structs import replace

from handlers.errors import Conflict, Failure, NotFound
from handlers.instance.metering import settled
from handlers.interfaces import Host
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef
from schemas.usage import Moment


@dataclass(frozen=True, slots=True)
class InstanceState:
    """`record` is the journal's, or made from the file for an instance never launched here."""

    record: InstanceRecord

    @property
    def status(self) -> Status:
        """The status that decides what a command may do: during another command the one before it.

        An instance whose snapshot is consumed counts as running: its guest may have run.
        """
        before = self.record.before
        if before is None:
            return self.record.status
        if self.record.consumed and before.status is Status.SLEEPING:
            return Status.RUNNING
        return before.status

    def refuse_incomplete(self, command_id: str) -> None:
        """Raise if another command passed its point of no return and did not complete."""
        record = self.record
        if record.before is not None and record.command_id != command_id:
            raise Conflict(
                f"instance {record.ref} is {record.status}: a previous command did not complete; "
                "retry it, or send StopInstance or DestroyInstance",
                detail={"status": str(record.status)},
            )

    def refuse_unknown(self) -> None:
        if self.status is Status.UNKNOWN:
            raise Conflict(
                f"instance {self.record.ref} is quarantined: its VMM could not be identified as "
                "hostd's; see docs/operations.md#unknown",
                detail={"status": str(self.status)},
            )

    def conflict(self, what: str, want: str) -> Failure:
        return Conflict(
            f"instance {self.record.ref} is {self.status}: cannot {what}, want {want}",
            detail={"status": str(self.status)},
        )


async def read_state(ref: InstanceRef, host: Host, now_ms: int) -> InstanceState:
    """Read journal, tombstone and file of an instance.

    A file that says running, warm or sleeping without a record in the journal counts as stopped,
    unless a snapshot manifest proves that it sleeps: then the journal was lost.

    Raises:
        NotFound: it is neither in the journal nor in the files.
        Invalid: `instance.json` is malformed or hostile.
    """
    record = host.records.instance(ref)
    if record is not None:
        # The files are not read: nothing in them may prevent a Stop.
        return InstanceState(record)
    try:
        file = await host.shared.instance(ref)
    except NotFound as error:
        raise NotFound(
            f"instance {ref} has no instance.json: expected <[paths] data>/tenants/{ref.tenant_id}"
            f"/pools/{ref.pool_id}/instances/{ref.instance_id}/instance.json; let agentd create "
            "the instance (for a trial: hostd seed)",
            path="instance.json",
        ) from error
    in_file = Status(file.status)
    status = in_file if in_file.never_started else Status.STOPPED
    record = InstanceRecord(ref=ref, status=status, since_ms=now_ms)
    tombstone = host.records.tombstone(ref)
    if tombstone is not None:
        # Launch numbers are never reused, and a kept disk is still the one that hostd made.
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
            vmm_version=asleep.vmm_version,
            disk=asleep.disk,
        )
    return InstanceState(record)


def final_record(record: InstanceRecord, status: Status, now: Moment) -> InstanceRecord:
    """The record at the end of a command: no command in progress, what it used is counted, and what
    its VMM is like is not known yet."""
    return replace(
        record,
        status=status,
        since_ms=now.wall_ms,
        before=None,
        command_id=None,
        hung=None,
        metering=settled(record, status, now),
    )
