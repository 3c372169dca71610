"""What each field of the protocol means, with its unit, and the rules that its type cannot say.

A name means the same in every message; `Type.name` is for one type only. Rules are built from the
constants that the decoder applies.
"""

import re
from collections.abc import Mapping
from typing import Final

from schemas import naming, subjects
from schemas.codec import DIGEST_DIGITS, TIME_MAX_MS
from schemas.protocol import usage_fields
from schemas.records import ABSENT, RELEASED, Status
from schemas.requests import PROTOCOL_MAX, PROTOCOL_MIN
from schemas.serde import LINE_MAX, U64_MAX
from schemas.tenant_net import PREFIX_MAX, PREFIX_MIN

Rule = Mapping[str, object]


def whole(pattern: re.Pattern[str]) -> Rule:
    """The rule of `pattern.fullmatch`."""
    return {"pattern": f"^(?:{pattern.pattern})$"}


_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_PREFIX = "|".join(str(bits) for bits in range(PREFIX_MIN, PREFIX_MAX + 1))

_ID = whole(naming.ID_PATTERN)
_HOST_ID = whole(naming.HOST_ID_PATTERN)
_COMMAND_ID = whole(naming.COMMAND_ID_PATTERN)
_BRIDGE = whole(naming.BRIDGE_NAME_PATTERN)
_SUBNET = whole(re.compile(f"{_IPV4}/(?:{_PREFIX})"))
_ADDRESS = whole(re.compile(_IPV4))
_COUNT = {"minimum": 0}
_TIME = {"minimum": 0, "maximum": TIME_MAX_MS}
_SHA256 = whole(re.compile("[0-9a-f]{64}"))
_ANNOUNCED = sorted((*Status, RELEASED, "up", "down", ABSENT))

RULES: Final[Mapping[str, Rule]] = {
    "tenant_id": _ID,
    "pool_id": _ID,
    "instance_id": _ID,
    "host_id": _HOST_ID,
    "at_ms": _TIME,
    "since_ms": _TIME,
    "hung_since_ms": _TIME,
    "lease_until_ms": _TIME,
    "seq": _COUNT,
    "took_us": _COUNT,
    "launch": _COUNT,
    "warm_vmms": _COUNT,
    "unfinished": _COUNT,
    "uptime_s": _COUNT,
    "bridge_name": _BRIDGE,
    "ipv4_subnet": _SUBNET,
    "gateway_ip": _ADDRESS,
    "mem_sha256": _SHA256,
    "request_digest": whole(re.compile(f"[0-9a-f]{{{DIGEST_DIGITS}}}")),
    "Hostd-Sha256": _SHA256,
    "Hostd-Truncated": whole(re.compile("[0-9]{1,10}")),
    "drain_timeout_secs": {"minimum": 0, "maximum": U64_MAX},
    "workspace_id": {"maxLength": LINE_MAX},
    "VolumeAttach.workspace_id": {},
    "volumes": {"maxItems": 0},
    "DoneDetail.volumes": {},
    "ReplyKeys.status": {"enum": sorted((*Status, RELEASED))},
    "Event.from": {"enum": _ANNOUNCED},
    "Event.to": {"enum": _ANNOUNCED},
    "CommandKeys.id": _COMMAND_ID,
    "CommandKeys.reply_to": {
        **whole(subjects.REPLY_TO_PATTERN),
        "not": {"pattern": subjects.NO_SUBJECT.pattern},
    },
    # A query with other IDs is answered, with `not_found`.
    **{
        f"{kind}.{name}": {}
        for kind in ("AskDescribe", "AskUsage")
        for name in ("tenant_id", "pool_id", "instance_id")
    },
}

_ENDS = ("VmmEndFacts", "VmmEndText", "VmmExited", "LastEnd")
_MEANING_OF_IDS = {
    "tenant_id": f"Tenant: {naming.ID_RULE}.",
    "pool_id": f"Pool of the tenant: {naming.ID_RULE}.",
    "instance_id": f"Instance of the pool: {naming.ID_RULE}.",
    "host_id": "Host: 1 to 63 characters A-Z, a-z, 0-9, '_' or '-'.",
    "workspace_id": "Protocol 2: the workspace; kept with the command, no effect.",
    "boot_id": "The kernel's ID of this boot of the host.",
    "journal_id": "ID of the host's journal, made with it; `seq` counts within it.",
    "machine_id": "The host's /etc/machine-id.",
    "product_uuid": "UUID of the machine by its firmware; empty if it has none.",
    "worker_id": "ID of the worker process that wrote this.",
    "command_id": "ID of the command that caused it.",
    "jail_id": "ID of the last launch's jail, also the VMM's `--id`; null before the first launch.",
    "drain": "Of a guest: how it was drained.",
    "DrainOfHost.drain": "ID of the drain.",
    "revision": "Revision of the pool's artifacts that the instance was launched with.",
    "claimed_id": "ID as read in a message that proves no right to it.",
}
_MEANING_OF_COMMANDS = {
    "v": "Version of the envelope.",
    "CommandKeys.id": "ID of the command, e.g. a UUIDv7: 1 to 64 characters A-Z, a-z, 0-9, "
    "'_' or '-'. One ID, one effect, one reply.",
    "request": "The command, as serde writes `HostdRequest`.",
    "issued_at_ms": "When it was issued: Unix time in milliseconds.",
    "deadline_ms": "Not started, retried or waited for after this: Unix time in milliseconds.",
    "reply_to": "Subject for a copy of the reply; begins with one of `[nats] inbox_prefixes`.",
    "issuer": f"Who sent it, for logs: at most {LINE_MAX} characters.",
    "traceparent": "W3C trace context of the span that this is part of.",
    "CommandKeys.traceparent": "W3C trace context, `00-<trace>-<span>-<flags>`; an invalid one is "
    "ignored.",
    "tracestate": "W3C tracestate, passed on; one that is invalid is ignored.",
    "force": "Do not ask the guest to finish its work; also ends the drain of an earlier Sleep.",
    "drain_timeout_secs": "Time for the guest to finish its work, in seconds; null: the pool's.",
    "wipe_volumes": "Wipe and delete the data disk; else it is kept.",
    "net": "The tenant's network, equal to that of tenant.json.",
    "tenant_net_id": "Number of the tenant's network; belongs to one tenant per host.",
    "ipv4_subnet": f"The tenant's subnet in CIDR notation, /{PREFIX_MIN} to /{PREFIX_MAX}, "
    "without host bits.",
    "gateway_ip": "The host's address in the subnet.",
    "bridge_name": "`br-tenant-<tenant_net_id>`.",
    "volumes": "Protocol 2: not supported yet, so it has to be empty.",
    "VolumeAttach.workspace_id": "Workspace of the volume.",
    "VolumeAttach.name": "Name of the volume.",
    "mount_path": "Where the guest mounts it.",
    "VolumeAttach.mode": "How it is mounted.",
}
_MEANING_OF_REPLIES = {
    "ReplyKeys.id": "ID of the command; `seq-<stream sequence>` if none could be read; "
    "`seq:<stream sequence>:<12 hex digits>` of a message without a valid envelope.",
    "response": "The outcome, as serde writes `HostdResponse`.",
    "code": "How it ended; says who must act.",
    "retryable": "Whether the same request may succeed later, with a new ID.",
    "changed": "False if the host was already in the requested state.",
    "status": "Status of the instance or network.",
    "attempts": "How often it was begun.",
    "replayed": "True in a reply that is sent again for the same command.",
    "received_at_ms": "Unix time in milliseconds at which the host took the command in.",
    "finished_at_ms": "Unix time in milliseconds of the outcome.",
    "steps": "What was done, in order of the end of each step.",
    "left_behind": "What an undo could not remove; the reconciler does.",
    "supported": f"Of `unsupported`: versions of the protocol, {PROTOCOL_MIN} to {PROTOCOL_MAX}.",
    "detail": "Facts; which depends on the kind.",
    "request_digest": "Which request it answers: the first 32 hex digits of the SHA-256 of its "
    "bytes in the named form of rmp-serde; absent if it could not be read.",
    "message": "One sentence for a person.",
    "took_us": "Duration in microseconds.",
    "outcome": "done: it changed the host; found: there already; failed; undone.",
    "name": "Name.",
    "act": "Who must act: the sender, the scheduler (another host, or later) or the operator.",
    "path": "The field at fault, as a path in the message or in a shared file.",
    "http_status": "What Firecracker's API answered with.",
    "errno": "Name of the kernel's error.",
    "by": "Who did it; of `superseded`: the ID of the later command.",
    "budget": "The budget that is used up.",
    "unit": "Unit of `asked`, `used` and `limit`.",
    "asked": "What the command needs of the budget.",
    "used": "What is used of the budget.",
    "limit": "Size of the budget.",
    "used_by": "Who uses most of the budget.",
    "vmm_end": "Why the VMM of this launch ended.",
    "vmm_log": "The end of the VMM's log.",
    "tap": "Name of the instance's TAP.",
    "method": "How the VMM was ended: graceful, sigkill, already_exited.",
    "size_bytes": "Size of the snapshot in bytes.",
    "drain_reason": "Why it was not drained.",
    "agent_failed": "Why the guest agent does not know that it woke.",
    "clock_failed": "Why the guest's clock was not set.",
    "clock_was_off_s": "By how much the guest's clock was wrong, in seconds.",
    "DoneDetail.volumes": "What became of the data disk.",
    "absent": "There was no such instance.",
    "warnings": "What on the host keeps guests from the network.",
    "shortened_from_bytes": "Size in bytes of the message before its detail was left out.",
    "protocol": "Versions of the protocol that the host takes.",
    "min": "The oldest.",
    "max": "The newest.",
}
_MEANING_OF_EVENTS = {
    "Event.id": "`<host_id>:<journal_id>:<seq>`, also its `Nats-Msg-Id`.",
    "seq": "Number of the event in its journal, from 1 without gaps; of a value: of the event that "
    "it reflects.",
    "at_ms": "Unix time in milliseconds.",
    "kind": "What it reports; also the last token of the subject.",
    "RemovedOrphan.kind": "Kind of the resource, as in `hostd inventory`.",
    "from": "Status before; it is the `to` of the last event of this lane.",
    "to": "Status now; `released` if the record was given up, `absent` of a network.",
    "reason": "Why, for a person.",
    "type": "Variant of the request.",
    "evidence": "Who says so; `log` is Firecracker's own word.",
    "launch": "Number of the launch, from 1 per instance; 0 before the first.",
    "text": "The same in one sentence.",
    "log_tail": "The end of the VMM's log.",
    "hung": "True if it does not answer, false if it answers again.",
    "misses": "Probes in a row without an answer.",
    "pid": "Process ID of the VMM.",
    "repaired": "What was restored.",
    "lost": "What cannot be restored while the VMM runs.",
    "mechanism": "Kind of the resource.",
    "key": "Which one.",
    "result": "removed, failed or cut off.",
    "jail": "ID of the jail that it runs in.",
    "table": "Table of the journal.",
    "error": "Why it cannot be read.",
    "snapshot": "Number of the snapshot.",
    "mem_sha256": "SHA-256 of the memory file, in hex.",
    "adopted": "Running VMMs that were taken over.",
    "ended": "VMMs that had ended meanwhile.",
    "quarantined": "VMMs that were not proven to be the launched ones.",
    "networks": "Networks that are in their desired state.",
    "failed": "How many failed.",
    "commands": "Commands that are continued.",
    "proved": "Facts that were proven.",
    "not_proved": "Facts that were not.",
    "fact": "Which fact.",
    "found": "What was found.",
    "low": "Whether the disk is full: nothing that needs space is begun.",
    "above_watermark": "Whether the disk is above its high watermark.",
    "free_bytes": "Free space in bytes.",
    "used_percent": "Used space in percent.",
    "jails": "Jails in which its VMMs run on.",
    "pids": "Process IDs of its VMMs.",
    "active": "Whether the host is draining.",
    "mode": "wait; or each running instance is put to sleep, or stopped.",
    "in_use": "Instances that have, or may have, a VMM.",
    "in_progress": "Instances whose command runs.",
    "done": "Instances that are done.",
    "unknown": "Instances of unknown status.",
    "versions": "By version.",
    "running": "Number of running instances.",
    "sleeping": "Number of sleeping instances.",
    "per_hour": "How many orphans are removed in an hour.",
    "left": "Orphans by kind.",
    "launches_quarantined": "Whether the host takes no Start.",
    "failures": "Launches in a row that failed.",
    "step": "The step that failed.",
}
_MEANING_OF_STATE = {
    "host_state": "recovering, ready, draining or degraded.",
    "degraded_by": "Why it is degraded.",
    "version": "Version.",
    "commit": "Commit of hostd's build, `+` at the end if the tree had other changes; or unknown.",
    "VmmVersion.state": "installed, removed, changed, missing, refused or unknown.",
    "starts": "Whether new Starts use it.",
    "limits_enforced": "Whether VMs have cgroup limits.",
    "capacity": "Budgets of the host.",
    "Capacity.instances": "Live instances.",
    "vcpus": "vCPUs; of a host: those that it admits.",
    "vcpus_used": "vCPUs of live instances.",
    "mem_mib": "Memory in MiB; of a host: what there is for VMs.",
    "mem_free_mib": "Memory in MiB for further VMs.",
    "disk_free_mib": "Disk space in MiB for further use.",
    "warm_vmms": "Idle VMMs that are ready for a Start or Wake.",
    "vmm_versions": "Versions of Firecracker that are installed or needed.",
    "since_ms": "Unix time in milliseconds since which it has this status.",
    "macs": "MAC addresses of the host.",
    "hostname": "The host's name.",
    "lease_until_ms": "Unix time in milliseconds until which the value is valid; 0: given up.",
    "Nats-Msg-Id": "ID of the letter.",
    "Hostd-Sha256": "SHA-256 of the original bytes, in hex.",
    "Hostd-Reason": "Why the message was not processed.",
    "Hostd-Truncated": "Size in bytes of the original; present if the payload was cut.",
}
_MEANING_OF_ANSWERS = {
    "uptime_s": "Seconds since the worker started.",
    "unfinished": "Commands without an outcome.",
    "lanes": "Unfinished commands by lane.",
    "instances": "Instances.",
    "StatusAnswer.instances": "Number of instances by status.",
    "ListAnswer.networks": "Networks.",
    "uid_slot": "Number of the jail's uid, from `[vmm] uid_base`; null without a VMM.",
    "offset": "Offset of the instance's address in the subnet; null before the first launch.",
    "hung_since_ms": "Unix time in milliseconds since which the VMM does not answer; else null.",
    "last_end": "Why its last VMM ended that ended without a command, perhaps launches ago.",
    "InstanceAnswer.snapshot": "Number of the snapshot; null if it does not sleep.",
    "vmm": "Counters of the VMM; null without one.",
    "cpu_us": "CPU time in microseconds since the launch, the guest's vCPUs included.",
    "memory_bytes": "Memory in bytes now.",
    "guest_sent_bytes": "Bytes that the guest sent since the launch.",
    "guest_sent_packets": "Packets that the guest sent since the launch.",
    "guest_received_bytes": "Bytes that the guest received since the launch.",
    "guest_received_packets": "Packets that the guest received since the launch.",
    "AskResult.id": "ID of the command.",
    "ResultAnswer.id": "ID of the command.",
    "CommandBefore.id": "ID of the command.",
    "state": "waiting, running or done.",
    "reply": "The reply envelope of a command that is done.",
    "effect": "What this command does to it.",
    "lane": "Lane of the command.",
    "before": "The first 20 commands of its lane that have not ended.",
    "provisional": "True if the rest holds only once those have ended.",
    "refused": "Why it would be refused; else null.",
    "changes": "Whether it would change the host.",
    "why": "Why it would change nothing.",
    "waits": "Locks and slots that others hold now.",
    "there": "Whether the resource exists now.",
    "ErrorAnswer.error": "Why the query was not answered.",
}
_MEANING_OF_EXTENDED = {
    f"{kind}.{name}": meaning
    for kinds, name, meaning in (
        (_ENDS, "code", "Exit code of the VMM; absent or null if it has none or it is not known."),
        (_ENDS, "signal", "Signal that ended it; absent or null if none did or it is not known."),
        (_ENDS, "reason", "Why the VMM ended: one of a bounded set of words."),
        (("PongDetail", "HostValue"), "version", "Version of hostd."),
    )
    for kind in kinds
}
MEANINGS: Final[Mapping[str, str]] = {
    **_MEANING_OF_IDS,
    **_MEANING_OF_COMMANDS,
    **_MEANING_OF_REPLIES,
    **_MEANING_OF_EVENTS,
    **_MEANING_OF_STATE,
    **_MEANING_OF_ANSWERS,
    **_MEANING_OF_EXTENDED,
    **usage_fields.MEANINGS,
}
"""The description of each field; a field without one fails the generation."""
