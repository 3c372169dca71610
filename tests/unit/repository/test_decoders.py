"""Each call of a decoder has a test with hostile input, or a reason why its input is trusted."""

# pyright: reportPrivateUsage=false

import ast
import asyncio
import contextlib
import hashlib
import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import nats.errors
import pytest
import structlog

from handlers.errors import Failure, HostFault, Invalid, Unavailable
from handlers.host.linux.checksummed_json import read_sealed
from handlers.host.net.policy_file import read_policy
from handlers.host.snapshot.manifest import Manifest
from handlers.host.storage.disk_ownership import parse_mark
from handlers.host.storage.instance_json import merged
from handlers.host.vmm.api_client import VmmApi
from handlers.host.vmm.api_schema import refusal
from handlers.host.vmm.guest_agent import GuestAgents
from handlers.host.vmm.versions import parse_version
from schemas import unpack
from schemas.decode_error import DecodeError
from schemas.naming import version_text
from schemas.partial import decode
from schemas.settings import PathSettings, Settings
from tests.unit.control.control_socket import connect, control_server, request
from worker import settings
from worker.bus import api_reply
from worker.bus.connection import Connection
from worker.bus.message import Message
from worker.bus.protocol import BusError
from worker.bus.pull_consumer import to_delivery
from worker.bus.wire import WireParser, read_headers
from worker.control.routes import Answer, Body, Route, read_body
from worker.descriptors import DescriptorReserve
from worker.health import HealthServer
from worker.metrics import Metrics
from worker.settings import keys as every_setting

ROOT = Path(__file__).parents[3]
NAMES = {
    "json.load",
    "json.loads",
    "tomllib.load",
    "tomllib.loads",
    "msgpack.unpackb",
    "msgpack.Unpacker",
    "msgspec.convert",
    "msgspec.json.decode",
    "msgspec.msgpack.decode",
    "h11.Connection",
    "bytes.fromhex",
}
# Why the input of a call is trusted, or cannot fail there.
PROC = "a number of the kernel in /proc, /sys or cgroupfs"
NAME = "a file name: at most 255 characters, checked to be digits"
MATCHED = "digits of a pattern that bounds their number, or of one checked before"
CONSTANT = "made by hostd from constants or checked values"
KERNEL = "the kernel's answer, or libnftables' of the kernel's"
NO_TEXT = "a number, a boolean or an address, not text"
LISTED = "the number of a snapshot's directory below hostd's own, a file name"
LABEL = "16 bytes of a superblock; what is not ASCII is escaped"
BOUNDED = "at most 16 bytes, checked to be ASCII digits"
PACKED = "packed by the line before"
JOURNAL = "hostd wrote it into its journal, a file of root"
CAUGHT = "a handler around the call catches ValueError and RecursionError, or any exception"
DEMO = "`hostd demo` runs its own guest"
SETTING = "checked when the settings were read"
ITSELF = "`schemas.partial.decode`, which raises nothing"
OPERATOR = "root's own /etc files"
# Tests of this module, and the calls that they feed.
FED = {
    "a_sealed_file_is_read_or_damaged": (
        "handlers/host/linux/checksummed_json.py:read_sealed:msgspec.json.decode",
    ),
    "a_policy_is_read_or_invalid": (
        "handlers/host/net/policy_file.py:read_policy:decode",
        "schemas/network_policy.py:decode_policy:msgspec.convert",
        "schemas/network_policy.py:decode_policy:tomllib.loads",
    ),
    "a_file_of_agentd_is_changed_or_invalid": (
        "handlers/host/storage/instance_json.py:merged:msgspec.json.decode",
        "handlers/host/storage/disk_ownership.py:parse_mark:msgspec.json.decode",
    ),
    "what_a_vmm_replies_is_a_failure": (
        "handlers/host/vmm/api_client.py:_read:msgspec.json.decode",
        "handlers/host/vmm/http_answers.py:_read_head:int",
    ),
    "what_a_vmm_says_of_itself_is_bounded": (
        "handlers/host/vmm/api_schema.py:refusal:int",
        "handlers/host/vmm/api_schema.py:refusal:msgspec.json.decode",
        "handlers/host/vmm/versions.py:parse_version:int",
        "schemas/naming.py:version_text:int",
    ),
    "what_a_guest_replies_is_unavailable": (
        "handlers/host/vmm/guest_agent.py:_decode:msgspec.json.decode",
        "handlers/host/vmm/guest_agent.py:exchange:unpack",
    ),
    "the_bytes_of_the_wire_are_decoded_or_invalid": (
        "schemas/partial.py:_form_at:msgpack.Unpacker",
        "schemas/partial.py:peek:msgpack.Unpacker",
        "schemas/partial.py:peek:unpack",
        "schemas/unpack.py:convert:msgspec.convert",
        "schemas/unpack.py:read_json:decode",
        "schemas/unpack.py:read_json:json.loads",
        "schemas/unpack.py:unpack:msgpack.unpackb",
    ),
    "what_the_bus_delivers_is_a_bus_error": (
        "worker/bus/api_reply.py:header_number:int",
        "worker/bus/api_reply.py:read_reply:msgspec.json.decode",
        "worker/bus/wire.py:_info:json.loads",
        "worker/bus/wire.py:_number:int",
        "worker/bus/wire.py:read_headers:decode",
    ),
    "what_is_sent_to_the_health_server_ends_one_connection": (
        "worker/health.py:_exchange:h11.Connection",
    ),
    "what_is_sent_to_the_control_socket_ends_one_connection": (
        "worker/control/server.py:_serve:decode",
        "worker/control/server.py:_serve:h11.Connection",
    ),
    "a_setting_is_read_or_refused": (
        "worker/settings.py:_collector:int",
        "worker/settings.py:_convert:msgspec.convert",
        "worker/settings.py:_listen:int",
        "worker/settings.py:_parse:float",
        "worker/settings.py:_parse:int",
        "worker/settings.py:_parse:json.loads",
        "worker/settings.py:_read_file:msgspec.convert",
        "worker/settings.py:_read_file:tomllib.load",
        "worker/settings.py:_service:int",
        "worker/settings.py:load_with_origins:msgspec.convert",
    ),
}
TRUSTED = {
    "schemas/trace_context.py:parse:int": MATCHED,
    "worker/tracing/collector.py:_span_context:int": MATCHED,
    "worker/tracing/collector.py:send:int": NO_TEXT,
    "worker/tracing/tracing.py:_root:int": CONSTANT,
    "worker/tracing/tracing.py:sent:decode": CAUGHT,
    "worker/queries/micro.py:asker_of:msgspec.json.decode": CAUGHT,
    "worker/queries/forms.py:write:msgspec.msgpack.decode": PACKED,
    "handlers/host/jail/layout.py:launch_of:int": NAME,
    "handlers/host/jail/logs.py:_kept:int": NAME,
    "handlers/host/linux/procfs.py:_unescape:int": MATCHED,
    "handlers/host/linux/syscalls.py:spread_subdirectories:unpack": KERNEL,
    "handlers/host/net/chains.py:one_later:int": CONSTANT,
    "handlers/host/net/conntrack.py:touches_subnet:int": NO_TEXT,
    "handlers/host/net/drift_watch.py:_of_links:unpack_from": KERNEL,
    "handlers/host/net/drift_watch.py:is_intact:int": MATCHED,
    "handlers/host/net/drift_watch.py:named:int": MATCHED,
    "handlers/host/net/host_network.py:warnings:int": PROC,
    "handlers/host/net/nft/libnftables.py:run:decode": KERNEL,
    "handlers/host/net/kept_routes.py:overlapping:int": NO_TEXT,
    "handlers/host/net/kept_routes.py:network_of:int": KERNEL,
    "handlers/host/net/netlink_messages.py:attributes:unpack_from": KERNEL,
    "handlers/host/net/netlink_messages.py:first_attribute:unpack_from": KERNEL,
    "handlers/host/net/netlink_messages.py:messages:unpack_from": KERNEL,
    "handlers/host/net/netlink_messages.py:pieces:unpack_from": KERNEL,
    "handlers/host/net/nft/elements.py:bytes.fromhex": CONSTANT,
    "handlers/host/net/nft/nftables.py:read:json.loads": KERNEL,
    "handlers/host/net/rtnetlink.py:add_connected_route:int": CONSTANT,
    "handlers/host/net/rtnetlink_messages.py:octets:bytes.fromhex": CONSTANT,
    "handlers/host/net/rtnetlink_reader.py:_acknowledged:unpack_from": CONSTANT,
    "handlers/host/net/rtnetlink_reader.py:_neighbour:unpack_from": KERNEL,
    "handlers/host/net/rtnetlink_reader.py:addresses:unpack_from": KERNEL,
    "handlers/host/net/rtnetlink_reader.py:all_addresses:unpack_from": KERNEL,
    "handlers/host/net/rtnetlink_reader.py:all_permanent_neighbours:unpack_from": KERNEL,
    "handlers/host/net/rtnetlink_reader.py:all_static_fdb:unpack_from": KERNEL,
    "handlers/host/net/rtnetlink_reader.py:counters:unpack_from": KERNEL,
    "handlers/host/net/rtnetlink_reader.py:error_of:unpack_from": KERNEL,
    "handlers/host/net/rtnetlink_reader.py:has_static_fdb:bytes.fromhex": CONSTANT,
    "handlers/host/net/rtnetlink_reader.py:link_of:unpack_from": KERNEL,
    "handlers/host/net/rtnetlink_reader.py:permanent_neighbours:unpack_from": KERNEL,
    "handlers/host/net/rtnetlink_reader.py:route_of:unpack_from": KERNEL,
    "handlers/host/net/ruleset.py:_apply:json.loads": KERNEL,
    "handlers/host/net/taps.py:delete_neighbours:int": MATCHED,
    "handlers/host/net/taps.py:port_settings:int": NO_TEXT,
    "handlers/host/snapshot/manifest.py:_published:int": MATCHED,
    "handlers/host/snapshot/manifest.py:numbers_of:int": MATCHED,
    "handlers/host/storage/drive_images.py:_find_inode:unpack_from": CONSTANT,
    "handlers/host/storage/drive_images.py:write:int": NO_TEXT,
    "handlers/host/vmm/cgroups.py:oom_counts_of:int": PROC,
    "handlers/host/vmm/exit_watch.py:_zombie_status:int": PROC,
    "handlers/host/vmm/exit_watch.py:exit_status:int": PROC,
    "handlers/host/vmm/cgroup_limits.py:restore:int": PROC,
    "handlers/host/vmm/cgroups.py:launches:int": MATCHED,
    "handlers/host/vmm/cgroups.py:pids:int": PROC,
    "handlers/host/vmm/cgroups.py:usage:int": PROC,
    "handlers/host/vmm/cgroups.py:memory_of:int": PROC,
    "handlers/host/vmm/confinement.py:read_uid:int": PROC,
    "handlers/host/storage/disk_proof.py:read_label:decode": LABEL,
    "handlers/host/vmm/exit_watch.py:read_exit_status:int": NO_TEXT,
    "handlers/host/vmm/exit_watch.py:read_exit_status:unpack_from": KERNEL,
    "handlers/host/orphans.py:_remove_snapshot:int": LISTED,
    "worker/meters/bus.py:bus_connected:int": NO_TEXT,
    "worker/meters/host.py:ready:int": NO_TEXT,
    "worker/meters/commands.py:finished:int": NO_TEXT,
    "worker/meters/host.py:disk:int": NO_TEXT,
    "worker/meters/host.py:draining:int": NO_TEXT,
    "worker/meters/host.py:limits_enforced:int": NO_TEXT,
    "worker/meters/vmms.py:quarantined:int": NO_TEXT,
    "worker/reconcile/orphans.py:net_id_of:int": MATCHED,
    "worker/reconcile/orphans.py:snapshot_key:int": MATCHED,
    "worker/reconcile/orphans.py:names_of_row:int": JOURNAL,
    "worker/journal/audit.py:close_cut_off:msgspec.convert": JOURNAL,
    "worker/journal/audit.py:newest:msgspec.convert": JOURNAL,
    "worker/journal/audit.py:spent_within:int": JOURNAL,
    "handlers/host/vmm/vmm_processes.py:_read:int": PROC,
    "handlers/host/vmm/processes.py:read_stat:int": PROC,
    "handlers/host/vmm/processes.py:uids_in_use:int": PROC,
    "handlers/host/linux/procfs.py:list_pids:int": PROC,
    "handlers/host/vmm/versions.py:_version:int": MATCHED,
    "handlers/host/vmm/vmms.py:_launched:int": BOUNDED,
    "handlers/host/vmm/vmms.py:_exited:int": CONSTANT,
    "handlers/host/vmm/vmms.py:_peer_pid:int": KERNEL,
    "handlers/host/vmm/vmms.py:_peer_pid:unpack": KERNEL,
    "handlers/instance/stop.py:stop_budget_s:float": NO_TEXT,
    "handlers/specs.py:parse:int": JOURNAL,
    "handlers/vmm_ends.py:_last_words:int": MATCHED,
    "handlers/vmm_ends.py:text_of:int": MATCHED,
    "schemas/files.py:_is_port:int": MATCHED,
    "schemas/files.py:agent_port:int": MATCHED,
    "schemas/files.py:offset_of:int": NO_TEXT,
    "schemas/naming.py:_address_count:int": NO_TEXT,
    "worker/bus/provision.py:make:int": NO_TEXT,
    "worker/cli/codec.py:_from_hex:bytes.fromhex": CAUGHT,
    "worker/cli/codec.py:_from_hex:decode": CAUGHT,
    "worker/cli/control_client.py:_answer_of:json.loads": CAUGHT,
    "worker/cli/doctor.py:of_worker:msgspec.convert": CAUGHT,
    "worker/cli/provision.py:_size:int": MATCHED,
    "worker/cli/seed.py:_free_offset:int": CAUGHT,
    "worker/cli/seed.py:_read:json.loads": CAUGHT,
    "worker/control/endpoint.py:client_of:unpack": KERNEL,
    "worker/control/draining.py:_read:msgspec.json.decode": CAUGHT,
    "worker/demo/guest.py:read_stat:json.loads": DEMO,
    "worker/demo/netns.py:enter_new_network:unpack_from": KERNEL,
    "worker/doctor/host_checks.py:conntrack:int": PROC,
    "worker/doctor/host_checks.py:kernel:int": MATCHED,
    "worker/health.py:__init__:int": SETTING,
    "worker/health.py:port:int": NO_TEXT,
    "schemas/acceptance.py:judge:decode": ITSELF,
    "worker/journal/admission.py:_unfinished:int": JOURNAL,
    "worker/journal/networks.py:_found:int": NO_TEXT,
    "worker/journal/networks.py:_subnet_of:int": NO_TEXT,
    "worker/journal/records.py:_delete_tombstone:msgspec.json.decode": JOURNAL,
    "worker/logs.py:__call__:float": NO_TEXT,
    "worker/reconcile/launch_quarantine.py:_kept:msgspec.json.decode": JOURNAL,
    "worker/reconcile/launch_quarantine.py:would_refuse:int": NO_TEXT,
    "worker/outbox.py:_send_dead:HEADERS.decode": CAUGHT,
    "worker/preflight.py:_read_ids:int": OPERATOR,
    "worker/queries/answers.py:result:msgpack.unpackb": JOURNAL,
    "worker/supervision/service_manager.py:__init__:int": MATCHED,
    "worker/journal/migration/backup.py:version_in_name:int": MATCHED,
    "worker/journal/migration/migrations.py:version_of:int": MATCHED,
    "worker/journal/schema.py:number:int": MATCHED,
    "worker/journal/loading.py:_load_records:decode": CAUGHT,
    "worker/journal/loading.py:_command_row:msgspec.convert": CAUGHT,
    "worker/journal/quarantined_rows.py:shown:decode": CONSTANT,
}

JAIL = "0123456789ab-1"


def calls() -> Iterator[str]:
    """`<file>:<function>:<decoder>` of each decoder call, also of `int(value)`."""
    for package in ("schemas", "handlers", "worker"):
        for path in sorted((ROOT / package).glob("**/*.py")):
            tree = ast.parse(path.read_text())
            yield from _calls(tree, str(path.relative_to(ROOT)), _decoders(tree))


def _decoders(tree: ast.AST) -> set[str]:
    """The names of the module that hold a msgspec decoder."""
    return {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "Decoder(" in ast.unparse(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _calls(node: ast.AST, where: str, decoders: set[str]) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        where = f"{where.partition(':')[0]}:{node.name}"
    if isinstance(node, ast.Call) and (name := _decoder(node, decoders)):
        yield f"{where}:{name}"
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, where, decoders)


def _decoder(call: ast.Call, decoders: set[str]) -> str:
    """The name of the decoder that is called; empty if it is none."""
    name = ast.unparse(call.func)
    if name in NAMES or name.removesuffix(".decode") in decoders:
        return name
    last = name.rpartition(".")[2]
    if last in {"unpack", "unpack_from"} and name != "unpack":
        return "" if name.startswith("unpack.") else last
    if last == "decode" and "errors" not in {keyword.arg for keyword in call.keywords}:
        return "" if "msgspec.json.encode(" in name else "decode"
    if name in {"int", "float"} and call.args and not isinstance(call.args[0], ast.Constant):
        return "" if isinstance(call.args[0], ast.BinOp) else name
    return ""


# What decoders fail on in ways of their own: RecursionError, ValueError of `int`, OverflowError ...
HOSTILE = {
    "empty": b"",
    "nesting": b"[" * 100_000,
    "nested_maps": b'{"a":' * 100_000,
    "nested_msgpack": b"\x91" * 60_000,
    "nested_tables": b"x = " + b"{a = " * 20_000,
    "digits_400": b"9" * 400,
    "digits_5000": b"9" * 5000,
    "hex_5000": b"0x" + b"f" * 5000,
    "float": b"1e400",
    "nan": b"NaN",
    "negative": b"-1",
    "superscript": "²".encode(),
    "arabic": "٣".encode(),
    "nul": b"\0",
    "surrogate": b'"\\ud800"',
    "surrogate_bytes": b'"\xed\xa0\x80"',
    "utf8": b'"\xff"',
    "huge": b'"' + b"a" * 300_000 + b'"',
    "truncated": b'{"a": "',
    "truncated_msgpack": b"\x81\xa1",
    "null": b"null",
    "list": b"[]",
}
FIELDS = (b"%s", b'{"a": %s}', b'{"error": %s}', b'{"state": %s, "vmm_version": "1"}', b"a = %s\n")
CORPUS = [
    pytest.param(field.replace(b"%s", data), id=f"{name}-{number}")
    for name, data in HOSTILE.items()
    for number, field in enumerate(FIELDS)
]


@pytest.mark.parametrize("data", CORPUS)
def test_the_bytes_of_the_wire_are_decoded_or_invalid(data: bytes) -> None:
    decode(data)
    for read in (unpack.unpack, unpack.read_json):
        with contextlib.suppress(DecodeError):
            read(data)
    with contextlib.suppress(DecodeError):
        unpack.convert(unpack.unpack(data), int)


@pytest.mark.parametrize("data", CORPUS)
def test_a_sealed_file_is_read_or_damaged(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "manifest.json"
    digest = hashlib.sha256(data).hexdigest().encode()
    for content in (data, b'{"sha256": "' + digest + b'", "facts": ' + data + b"}"):
        path.write_bytes(content)
        with pytest.raises(HostFault):
            read_sealed(str(path), Manifest)


@pytest.mark.parametrize("data", CORPUS)
def test_a_policy_is_read_or_invalid(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(data)
    path.chmod(0o644)
    with contextlib.suppress(Invalid):
        read_policy(str(path), None)


@pytest.mark.parametrize("data", CORPUS)
def test_a_file_of_agentd_is_changed_or_invalid(data: bytes) -> None:
    with contextlib.suppress(Invalid):
        merged(data, {"a": 1}, "instance.json")
    assert parse_mark(data) is None


@pytest.mark.parametrize("data", CORPUS)
async def test_what_a_vmm_replies_is_a_failure(tmp_path: Path, data: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        writer.write(next(replies))
        writer.close()

    length = b"HTTP/1.1 200 OK\r\nContent-Length: "
    replies = iter(
        (
            length + str(len(data)).encode() + b"\r\n\r\n" + data,
            length + data + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data + b"\r\n",
            b"HTTP/1.1 " + data + b"\r\n\r\n",
            data,
        )
    )
    async with await asyncio.start_unix_server(serve, tmp_path / "api.sock"):
        for _ in range(5):
            api = VmmApi(str(tmp_path), timeout_s=60, snapshot_timeout_s=60)
            with pytest.raises((Unavailable, HostFault)):
                await api.info()
            await api.close()


@pytest.mark.parametrize("data", CORPUS)
def test_what_a_vmm_says_of_itself_is_bounded(data: bytes) -> None:
    text = data.decode(errors="replace")

    assert isinstance(refusal("GET", "/", 400, data), Failure)
    assert isinstance(refusal("GET", "/", 400, b"(os error " + data + b")"), Failure)
    for version in (text, f"1.2.{text}", f"{text}.1.2"):
        with contextlib.suppress(HostFault):
            parse_version(version)
        assert len(version_text(version)) < 30


@pytest.mark.parametrize("data", CORPUS)
async def test_what_a_guest_replies_is_unavailable(tmp_path: Path, data: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"OK 1\n")
        (length,) = struct.unpack(">I", await reader.readexactly(4))
        await reader.readexactly(length)
        writer.write(struct.pack(">I", len(data)) + data)
        writer.close()

    root = tmp_path / "jails" / "firecracker" / JAIL / "root"
    root.mkdir(parents=True)
    agents = GuestAgents(Settings(paths=PathSettings(state=str(tmp_path))))
    directory = os.open(root, os.O_PATH)
    try:
        async with await asyncio.start_unix_server(serve, f"/proc/self/fd/{directory}/v.sock"):
            with pytest.raises(Unavailable):
                await agents.ping(JAIL, 5252, timeout_s=60)
    finally:
        os.close(directory)


@pytest.mark.parametrize("data", CORPUS)
async def test_what_the_bus_delivers_is_a_bus_error(data: bytes) -> None:
    text = data.decode(errors="replace")

    with contextlib.suppress(BusError):
        reply = api_reply.read_reply(data, "stream s")
        reply.get("error", {}).get("err_code")
        api_reply.sequence_of(api_reply.member(reply, "state", "s"), "last_seq", "s")
    number = api_reply.header_number(text)
    assert number is None or 0 <= number < 10**20
    for ack in (text, ".".join((*"abcd", text, "1", *"abc")), ".".join((*"abcd", "1", text, "a"))):
        with contextlib.suppress(BusError):
            to_delivery(Message("s", ack, b"", {}), cast("Connection", None))
    read_headers(b"NATS/1.0 " + data + b"\r\n" + data + b": " + data)
    for line in (data, b"MSG a 1 " + data, b"HMSG a " + data + b" 1 1", b"INFO " + data):
        with contextlib.suppress(nats.errors.ProtocolError):
            await WireParser(Deaf()).parse(line + b"\r\n")


class Deaf:
    """What the parser calls; does nothing."""

    def take(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> bool:
        return False

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None: ...
    async def _process_err(self, err_msg: str) -> None: ...
    async def _process_info(self, info: dict[str, Any]) -> None: ...
    async def _process_ping(self) -> None: ...
    async def _process_pong(self) -> None: ...


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
async def test_what_is_sent_to_the_health_server_ends_one_connection(data: bytes) -> None:
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    async with HealthServer("127.0.0.1:0", Metrics("1"), dict, DescriptorReserve(0)) as server:
        for head in (b"", b"GET /metrics HTTP/1.1\r\nContent-Length: ", b"GET "):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head + data + b"\r\n\r\n")
            with contextlib.suppress(OSError):  # also ENOTCONN of shutdown(2), after a reset
                writer.write_eof()
                await reader.read()
            writer.close()

    assert raised == []


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
async def test_what_is_sent_to_the_control_socket_ends_one_connection(
    tmp_path: Path, data: bytes
) -> None:
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    with structlog.testing.capture_logs() as logged:
        async with control_server(tmp_path, Route("POST", "/v1/x", _take_number)):
            for head in (b"", b"POST /v1/x HTTP/1.1\r\nContent-Length: ", b"POST "):
                await _send_and_end(tmp_path, head + data + b"\r\n\r\n")
            await _send_and_end(tmp_path, request("POST", "/v1/x", data))
            await _send_and_end(tmp_path, request("POST", "/v1/x", b'{"number": ' + data + b"}"))

    assert (raised, logged) == ([], [])


class _Number(msgspec.Struct):
    number: int


async def _take_number(body: Body) -> Answer:
    return {"number": read_body(body, _Number).number}


async def _send_and_end(run: Path, sent: bytes) -> None:
    reader, writer = await connect(run)
    writer.write(sent)
    with contextlib.suppress(OSError):  # after a reset
        writer.write_eof()
        await reader.read()
    writer.close()


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_setting_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "hostd.toml"
    text = data.decode(errors="surrogateescape")
    for key in every_setting():
        path.write_bytes(f"[{key.table}]\n{key.name} = ".encode() + data)
        for file, environ in ((str(path), {}), (None, {key.env: text})):
            with contextlib.suppress(settings.SettingsError):
                settings.load(file, environ)
    for value in (f"h:{text}", f"tcp/{text}"):
        for rule in ("health.listen", "network.host_services"):
            with contextlib.suppress(settings.SettingsError):
                settings.load(None, {f"HOSTD_{rule.replace('.', '_').upper()}": value})


def test_each_decoder_has_hostile_input_or_a_reason_to_trust_it() -> None:
    found = set(calls())
    listed = [*itertools.chain(*FED.values()), *TRUSTED]

    assert sorted(found - set(listed)) == [], "no entry: feed it HOSTILE in a test here"
    assert sorted(set(listed) - found) == [], "entries of calls that are gone"
    assert len(listed) == len(set(listed))


def test_each_entry_names_a_test_of_this_module() -> None:
    assert {test for test in FED if f"test_{test}" not in globals()} == set()
