"""Checks of a running worker, for `GET /v1/doctor`: from memory, the journal and the network."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from handlers.claims.unrecorded import UnrecordedVmm
from handlers.errors import Unavailable
from schemas.records import InstanceRecord, Status
from worker.bus.protocol import BusError
from worker.control.routes import Answer, Body, read_nothing
from worker.control.view import WorkerView
from worker.doctor.findings import Checks, Finding, Severity, run_checks
from worker.lanes import Work

SHOWN: Final = 100  # findings of one kind
LONG_S: Final = 120.0  # of one step that is not a wait
UNSENT_ROWS: Final = 1000
# Steps that take as long as somebody else lets them.
WAITS: Final = ("wait_", "drain_guest", "stop_vmm", "wipe_volumes", "artifact")

# Per check of `/readyz`: what is wrong, why it matters, what to run.
NOT_READY: Final[Mapping[str, tuple[str, str, str]]] = {
    "recovered": (
        "the worker recovers",
        "commands wait until it has adopted what runs; some seconds are normal",
        "hostd dump, and the log of the worker",
    ),
    "connected": (
        "the worker is not connected to NATS",
        "no command arrives and no reply leaves; VMs are not affected",
        "journalctl -u hostd | grep bus. ; hostd check-config",
    ),
    "can_commit": (
        "the journal cannot commit",
        "no command is taken until it can; the log has the reason",
        "df -h and dmesg for the file system of [paths] state",
    ),
    "has_disk_space": (
        "the file system of [paths] state was full and the ballast is released",
        "Start, Wake, Sleep and SetupNetwork are refused",
        "du -x on [paths] state; see docs/operations.md, Full disk",
    ),
    "below_disk_watermark": (
        "the file system of [paths] state is above [limits] disk_high_percent",
        "Start, imports and unforced Sleeps are refused until it is below disk_low_percent",
        "df -h and du -x on [paths] state; destroy what is not needed",
    ),
    "calls_return": (
        "system calls hang, and no thread may replace theirs any more",
        "whatever needs one of them is answered unavailable",
        "hostd dump (threads); dmesg; a wedged kernel needs a reboot",
    ),
    "launches_succeed": (
        "launches kept failing by the host's fault: no Start is begun but a probe now and then",
        "agentd has to use other hosts",
        "journalctl -u hostd | grep launch; then hostd undrain, which ends it",
    ),
    "has_vmm_versions": (
        "a version of Firecracker in use is changed, removed or missing",
        "its instances cannot be started or woken, or only by a copy",
        "hostd ping (vmm_versions); see docs/operations.md, Upgrading Firecracker",
    ),
    "has_descriptors": (
        "the worker has no free descriptor",
        "whatever needs one is refused",
        "raise LimitNOFILE of the unit; systemctl restart hostd",
    ),
    "leased": (
        "the worker does not hold the lease of its host id",
        "it takes no commands and writes no state; another host may use the id",
        "journalctl -u hostd | grep lease. ; hostd check-config",
    ),
    "acks_move": (
        "the consumer's acknowledgement window is full and does not move",
        "no new command arrives",
        "journalctl -u hostd | grep -e intake -e bus.ack",
    ),
}


class WorkerChecks:
    """Each method is one check and returns its findings."""

    def __init__(self, worker: WorkerView) -> None:
        self._worker = worker

    async def answer(self, body: Body) -> Answer:
        read_nothing(body)
        found = await run_checks(self.all())
        return {
            "version": self._worker.versions["hostd"],
            "findings": [msgspec.to_builtins(finding) for finding in found],
        }

    def all(self) -> Checks:
        return {
            "readiness": self.readiness,
            "provisioning": self.provisioning,
            "drain": self.drain,
            "instances": self.instances,
            "journal_rows": self.journal_rows,
            "outbox": self.outbox,
            "dead_letters": self.dead_letters,
            "unrecorded_vmms": self.unrecorded_vmms,
            "orphans": self.orphans,
            "left_behind": self.left_behind,
            "slow_steps": self.slow_steps,
            "network": self.network,
        }

    async def readiness(self) -> Iterable[Finding]:
        checks = self._worker.checks()
        return [
            Finding(Severity.ERROR, "readiness", *NOT_READY[name])
            for name, passed in checks.items()
            if not passed and name in NOT_READY
        ]

    async def provisioning(self) -> Iterable[Finding]:
        trouble = self._worker.bus.trouble
        if not trouble:
            return []
        what = f"streams, consumer, bucket or imports are not as needed: {trouble}"
        why = "no command is taken until they are"
        return [Finding(Severity.ERROR, "provisioning", what, why, "hostd provision")]

    async def drain(self) -> Iterable[Finding]:
        drain = self._worker.drain.active
        if drain is None:
            return []
        when = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(drain.since_ms / 1000))
        what = f"the host is drained, mode {drain.mode}, since {when}"
        why = "Start and Wake are refused, and /readyz is 503"
        return [Finding(Severity.INFO, "drain", what, why, "hostd undrain")]

    async def instances(self) -> Iterable[Finding]:
        if not self._worker.journal.records.statuses().get(Status.UNKNOWN, 0):
            return []
        records = self._worker.journal.records.instances()
        unknown = [record for record in records if record.status is Status.UNKNOWN]
        return _cut([_unknown(record) for record in unknown])

    async def journal_rows(self) -> Iterable[Finding]:
        return _cut(
            [
                Finding(
                    Severity.ERROR,
                    "journal_rows",
                    f"this version cannot read row {row.key} of the journal's table {row.table}: "
                    f"{row.reason}",
                    "what it is about is left alone, and what it may hold is not given out",
                    "see docs/operations.md, Rows that cannot be read",
                )
                for row in self._worker.journal.quarantine.rows()
            ]
        )

    async def outbox(self) -> Iterable[Finding]:
        outbox = self._worker.journal.outbox
        found: list[Finding] = []
        if outbox.held:
            found.append(
                Finding(
                    Severity.ERROR,
                    "outbox",
                    f"{outbox.held} messages are held: NATS does not accept them as they are",
                    "their senders got no reply, or an event is missing",
                    "journalctl -u hostd | grep outbox.row_held; raise max_payload of the server",
                )
            )
        if outbox.depth >= UNSENT_ROWS:
            found.append(
                Finding(
                    Severity.WARNING,
                    "outbox",
                    f"{outbox.depth} replies, events and state values are not sent",
                    "at 100,000 the worker takes no more commands",
                    "journalctl -u hostd | grep -e bus. -e outbox.",
                )
            )
        return found

    async def dead_letters(self) -> Iterable[Finding]:
        bus = self._worker.bus
        if not bus.connected or bus.trouble:  # readiness or provisioning say so
            return []
        try:
            count = await bus.dead_letters()
        except BusError as error:
            raise Unavailable(str(error)) from error
        what = f"{count} dead letters: messages to this host that could not be processed"
        why = "their senders got an error, or no answer; they are kept for 30 days"
        run = "hostd dead ls, with the administrator's --creds; then hostd dead replay or drop"
        return [Finding(Severity.WARNING, "dead_letters", what, why, run)] if count else []

    async def unrecorded_vmms(self) -> Iterable[Finding]:
        return _cut([_unrecorded(each) for each in self._worker.unrecorded.vmms])

    async def orphans(self) -> Iterable[Finding]:
        return [
            Finding(
                Severity.WARNING,
                "orphans",
                f"{count} {kind} with hostd's mark belong to nothing in the journal",
                "they take up memory, disk or names, and nothing uses them",
                "hostd sweep --dry-run, then hostd sweep",
            )
            for kind, count in self._worker.metrics.orphan_counts.items()
        ]

    async def left_behind(self) -> Iterable[Finding]:
        rows = [
            (command_id, row)
            for command_id, rows in self._worker.journal.steps.leftovers().items()
            for row in rows
        ]
        return _cut(
            [
                Finding(
                    Severity.WARNING,
                    "left_behind",
                    f"{row.mechanism} {row.key}, of command {command_id}, could not be removed",
                    "it is tried again every 30 s; a fault of the host keeps it",
                    "journalctl -u hostd | grep -e leftover. -e step.left_behind",
                )
                for command_id, row in rows
            ]
        )

    async def slow_steps(self) -> Iterable[Finding]:
        now_s = time.perf_counter()
        found: list[Finding] = []
        for lane, (running, _) in self._worker.lanes.work().items():
            if not isinstance(running, Work) or running.steps is None:
                continue
            for step, began_s in running.steps.doing:
                if now_s - began_s >= LONG_S and not step.startswith(WAITS):
                    found.append(
                        Finding(
                            Severity.ERROR,
                            "slow_steps",
                            f"command {running.row.id} in lane {lane} has been in step {step} "
                            f"for {now_s - began_s:.0f} s",
                            "a system call or a VMM hangs, and the lane waits for it",
                            "hostd dump (threads and tasks); dmesg; cat /proc/PID/stack",
                        )
                    )
        return _cut(found)

    async def network(self) -> Iterable[Finding]:
        tenants = len(self._worker.journal.records.networks())
        return [
            Finding(
                Severity.WARNING,
                "network",
                text,
                "guests are kept from the network",
                "nft list ruleset; sysctl net.netfilter.nf_conntrack_max",
            )
            for text in await self._worker.networks.warnings(tenants)
        ]


def _unknown(record: InstanceRecord) -> Finding:
    ref = record.ref
    return Finding(
        Severity.ERROR,
        "instances",
        f"instance {ref} is quarantined (unknown): its VMM is not proven to be the one launched",
        "every command for it is answered conflict; its uid, address and quota stay taken",
        f"hostd adopt {ref.tenant_id} {ref.pool_id} {ref.instance_id}, or hostd release; see "
        "docs/operations.md, unknown",
    )


def _unrecorded(vmm: UnrecordedVmm) -> Finding:
    process = vmm.process
    jail = f"jail {process.jail_id}" if process.jail_id else "no jail of hostd's"
    taps = f" and TAP {', '.join(vmm.taps)}" if vmm.taps else ""
    return Finding(
        Severity.WARNING,
        "unrecorded_vmms",
        f"process {process.pid} is a VMM in no record: {jail}, uid {process.uid}, "
        f"{process.size_mib} MiB{taps}",
        "it is never killed; its uid, memory, address and jail ID are not given out",
        "hostd adopt TENANT POOL INSTANCE, or end it: see docs/operations.md, unknown",
    )


def _cut(findings: Sequence[Finding]) -> Sequence[Finding]:
    """At most `SHOWN`; the last one says how many more there are."""
    if len(findings) <= SHOWN:
        return findings
    last = findings[SHOWN - 1]
    more = msgspec.structs.replace(last, what=f"and {len(findings) - SHOWN + 1} more of this kind")
    return [*findings[: SHOWN - 1], more]
