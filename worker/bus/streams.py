"""The configurations of streams, bucket and consumers, used to create and to check them.

They use the server's JSON names and units (nanoseconds, bytes), so that the configuration which a
server returns can be compared field by field: a server older than a field drops it without an
error.
"""

from collections.abc import Mapping, Set
from importlib.metadata import version
from typing import Any

from schemas.subjects import Subjects

NS = 1_000_000_000
DAY_NS = 86_400 * NS
MESSAGE_BYTES = 65_536
MIB = 1 << 20
# The sizes of a cell, by kind; at the bound, `cmd` and `state` refuse new messages, the others drop
# the oldest. `LANE_MESSAGES` is the largest backlog of one lane.
SIZES_MIB = {"cmd": 512, "evt": 1024, "reply": 1024, "dead": 256, "state": 512}
LANE_MESSAGES = 5000
DEDUPE_NS = 600 * NS
# Commands are acknowledged as soon as they are journalled, in milliseconds. A command
# delivered into a connection that died is delivered again only after this time, however soon the
# worker reconnects.
ACK_WAIT_NS = 3 * NS
MAX_CONSUMERS = 1000
ACK_PENDING = 256
MAX_WAITING = 16
# For an administrator: whose it is, and which hostd made or changed it last.
METADATA = {"owner": "hostd", "hostd_version": version("hostd")}


def bucket_stream(subjects: Subjects) -> str:
    """The stream that carries the state bucket."""
    return f"KV_{subjects.state_bucket}"


def state_subject(subjects: Subjects, key: str) -> str:
    """The subject of one key of the bucket."""
    return f"$KV.{subjects.state_bucket}.{key}"


def js_api(domain: str) -> str:
    """The prefix of JetStream's API: under the name of a domain, or of the own account (ADR 0206).

    An account without JetStream has a `$JS.API.>` of its own that answers "not enabled", so one
    that uses another account's JetStream imports it under another name.
    """
    return f"$JS.{domain}.API." if domain else "$JS.API."


def inbox_prefix(host_id: str) -> str:
    """Prefix of a host's own inboxes: outside `_INBOX.`, to which hosts may reply (ADR 0201)."""
    return f"_INBOX_HOSTD.{host_id}"


def stream_of(subjects: Subjects, subject: str) -> str | None:
    """The stream that a subject of this host is bound to; None: none of these."""
    kind, _, _ = subject.removeprefix(f"{subjects.root}.{subjects.host_id}.").partition(".")
    match kind:
        case "evt":
            return subjects.events_stream
        case "reply":
            return subjects.replies_stream
        case "dead":
            return subjects.dead_stream
        case _:
            return None


def stream_configs(
    subjects: Subjects, *, replicas: int = 1, sizes_mib: Mapping[str, int] = SIZES_MIB
) -> tuple[dict[str, Any], ...]:
    """The four streams and the bucket of a cell. `max_consumers` is explicit: servers differ."""

    texts = descriptions(subjects)

    def stream(name: str, kind: str, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "description": texts[name],
            "metadata": METADATA,
            "subjects": [subjects.of_all_hosts(kind)],
            "retention": "limits",
            "storage": "file",
            "discard": "old",
            "num_replicas": replicas,
            "max_consumers": MAX_CONSUMERS,
            "max_bytes": sizes_mib[kind] * MIB,
            "duplicate_window": DEDUPE_NS,
            **more,
        }

    return (
        stream(
            subjects.commands_stream,
            "cmd",
            retention="workqueue",
            discard="new",
            max_age=7 * DAY_NS,
            max_msg_size=MESSAGE_BYTES,
            max_msgs_per_subject=LANE_MESSAGES,
            discard_new_per_subject=True,
        ),
        stream(subjects.events_stream, "evt", max_age=7 * DAY_NS, allow_direct=True),
        stream(
            subjects.replies_stream,
            "reply",
            max_age=DAY_NS,
            allow_direct=True,
        ),
        stream(subjects.dead_stream, "dead", max_age=30 * DAY_NS, allow_direct=True),
        {
            "name": bucket_stream(subjects),
            "description": texts[bucket_stream(subjects)],
            "metadata": METADATA,
            "subjects": [f"$KV.{subjects.state_bucket}.>"],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "num_replicas": replicas,
            "max_consumers": MAX_CONSUMERS,
            "max_bytes": sizes_mib["state"] * MIB,
            "duplicate_window": 120 * NS,
            "max_msgs_per_subject": 1,
            "max_msg_size": MESSAGE_BYTES,
            # A rollup header deletes all messages of the stream, those of other hosts too.
            "allow_rollup_hdrs": False,
            "deny_delete": True,
            "allow_direct": True,
        },
    )


def mirror_delivery(subjects: Subjects) -> str:
    """Prefix of the subjects under which mirrors of the cell get their messages."""
    return f"HOSTD_MIRROR.{subjects.cell}"


def mirror_configs(
    subjects: Subjects, js_domain: str, *, sizes_mib: Mapping[str, int] = SIZES_MIB
) -> tuple[dict[str, Any], ...]:
    """Copies of what dashboards read, of the same names, in the JetStream of another server.

    Args:
        subjects: of the cell; their host is not used.
        js_domain: the name under which that server reaches the JetStream of the cell.
        sizes_mib: as of the cell's own streams; a smaller mirror of a stream keeps less history.
    """
    shown = (subjects.events_stream, subjects.dead_stream, bucket_stream(subjects))
    api = js_api(js_domain).removesuffix(".")
    found: list[dict[str, Any]] = []
    for config in stream_configs(subjects, sizes_mib=sizes_mib):
        name = config["name"]
        if name not in shown:
            continue
        mirror = {field: config[field] for field in config.keys() - OF_THE_ORIGINAL}
        mirror["description"] += " (mirror)"
        mirror["discard"] = "old"
        external = {"api": api, "deliver": mirror_delivery(subjects)}
        mirror["mirror"] = {"name": name, "external": external}
        if name == bucket_stream(subjects):
            # Leaf nodes do not pass `$KV.>` on, and so a reader's feed begins where the copy is.
            mirror["republish"] = {"src": ">", "dest": ">"}
        found.append(mirror)
    return tuple(found)


def descriptions(subjects: Subjects) -> dict[str, str]:
    """One line about each stream of the cell, by its name."""
    cell = f"hostd, cell {subjects.cell}"
    return {
        subjects.commands_stream: f"{cell}: commands of agentd, until journalled by their host",
        subjects.events_stream: f"{cell}: events of hosts, networks and instances",
        subjects.replies_stream: f"{cell}: replies to commands, for senders that ask later",
        subjects.dead_stream: f"{cell}: messages that no host could take, see `hostd dead`",
        bucket_stream(subjects): f"{cell}: present state of hosts, networks and instances",
    }


def kinds(subjects: Subjects) -> dict[str, str]:
    """What each stream of the cell holds, by its name: a word that is the same in every cell."""
    return {
        subjects.commands_stream: "commands",
        subjects.events_stream: "events",
        subjects.replies_stream: "replies",
        subjects.dead_stream: "dead",
        bucket_stream(subjects): "state",
    }


def consumer_config(subjects: Subjects, *, ack_wait_ns: int = ACK_WAIT_NS) -> dict[str, Any]:
    """This host's durable pull consumer. No `max_deliver`: a command is delivered until acked."""
    return {
        "durable_name": subjects.consumer,
        "description": f"hostd, cell {subjects.cell}: the worker of host {subjects.host_id}",
        "metadata": METADATA,
        "filter_subject": subjects.command_filter,
        "deliver_policy": "all",
        "ack_policy": "explicit",
        "ack_wait": ack_wait_ns,
        "max_deliver": -1,
        "max_ack_pending": ACK_PENDING,
        "max_waiting": MAX_WAITING,
        "replay_policy": "instant",
    }


# Fields that change nothing for the worker: those of a stream or consumer that an administrator may
# set, and those that servers add.
NEUTRAL = frozenset({"description", "metadata", "created", "num_replicas", "sample_freq"})
STREAM_NEUTRAL = NEUTRAL | {"placement", "compression"}
# What an administrator may tune; `hostd provision` resets it, the worker does not ask for it.
STREAM_TUNABLE = frozenset(
    {"storage", "max_age", "max_bytes", "max_msgs", "max_msg_size", "max_consumers"}
) | {"duplicate_window", "consumer_limits"}
CONSUMER_TUNABLE = frozenset({"ack_wait", "max_ack_pending", "max_waiting", "mem_storage"})
OF_THE_ORIGINAL = frozenset({"subjects", "duplicate_window"})  # what a mirror cannot have
UNSET: tuple[object, ...] = (0, -1, False, "", [], {}, None)


def differences(
    wanted: Mapping[str, Any], found: Mapping[str, Any], ignored: Set[str] = frozenset()
) -> list[str]:
    """Fields with another value, e.g. `max_age: is 0, must be 86400000000000`.

    Any field that is not `wanted` must be unset: a field such as `headers_only` or `republish`
    changes what the wanted ones mean, and a later server may have more of them.
    """
    wrong: list[str] = []
    for field, value in wanted.items():
        # The server omits what is zero or false.
        is_value = found.get(field, type(value)())
        if field not in ignored and is_value != value:
            wrong.append(f"{field}: is {is_value!r}, must be {value!r}")
    wrong += [
        f"{field}: is {value!r}, must be unset"
        for field, value in sorted(found.items())
        if field not in wanted and field not in ignored and value not in UNSET
    ]
    return wrong


def consumer_found(info: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in the answer to CONSUMER.INFO; the end of a past pause is left out."""
    config = dict(info["config"])
    config.pop("name", None)  # beside durable_name, since 2.9
    if not info.get("paused", True):
        config.pop("pause_until", None)
    return config
