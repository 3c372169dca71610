"""The shared files lie where an unprivileged process writes: every rule, with file and field."""

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec.inspect import IntType, StructType, UnionType, type_info

from schemas.codes import Code
from schemas.decode_error import DecodeError
from schemas.files import (
    InstanceFile,
    PoolSpec,
    TenantConfig,
    check_instance_net,
    offset_of,
    parse_instance,
    parse_pool,
    parse_tenant,
)
from schemas.requests import TenantNet
from tests.constants import REF

NET = TenantNet(259, "10.241.3.0/24", "10.241.3.1", "br-tenant-259")
TENANT: dict[str, Any] = {
    "tenant_id": "acme",
    "quotas": {
        "max_vcpus": 16,
        "max_mem_mib": 2**64 - 1,
        "max_running": 8,
        "max_warm": 4,
        "max_pools": 4,
        "max_instances_per_pool": 16,
        "max_disk_gib": 100,
    },
    "net": {
        "tenant_net_id": 259,
        "ipv4_subnet": "10.241.3.0/24",
        "gateway_ip": "10.241.3.1",
        "bridge_name": "br-tenant-259",
    },
    "secrets_epoch": 0,
    "config_version": 1,
    "pinned": False,
    "audit_retention_days": 0,
    "created_at": "2026-01-01T00:00:00Z",
}
POOL: dict[str, Any] = {
    "pool_id": "web",
    "tenant_id": "acme",
    "flake_ref": ".",
    "profile": "minimal",
    "instance_resources": {"vcpus": 2, "mem_mib": 512, "data_disk_mib": 64},
    "desired_counts": {"running": 1, "warm": 0, "sleeping": 0},
    "runtime_policy": {"drain_timeout_seconds": 5},
    "metadata": {"tags": {"team": "x", "hostd.ready": "api", "hostd.agent_port": "6000"}},
}
INSTANCE: dict[str, Any] = {
    "instance_id": "i-1",
    "pool_id": "web",
    "tenant_id": "acme",
    "status": "ready",
    "net": {
        "tap_dev": "tn259i7",
        "mac": "02:fc:01:03:00:07",
        "guest_ip": "10.241.3.7",
        "gateway_ip": "10.241.3.1",
        "cidr": 24,
    },
    "revision_hash": "abc123",
    "idle_metrics": {"idle_secs": 0, "cpu_pct": 0.5, "net_bytes": 0, "last_updated": None},
    "tags": {"a": "b"},
    "extra": "agentd may call a field so",
}
FILES: dict[str, tuple[dict[str, Any], Callable[[bytes], object]]] = {
    "tenant.json": (TENANT, lambda data: parse_tenant(data, "tenant.json", "acme")),
    "pool.json": (POOL, lambda data: parse_pool(data, "pool.json", "acme", "web")),
    "instance.json": (INSTANCE, lambda data: parse_instance(data, "instance.json", REF)),
}
GONE = object()


def refused(parse: Callable[[bytes], object], data: bytes) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        parse(data)
    assert caught.value.code is Code.INVALID
    return caught.value


def test_files_as_agentd_writes_them_are_read() -> None:
    tenant = parse_tenant(json.dumps(TENANT).encode(), "tenant.json", "acme")
    pool = parse_pool(json.dumps(POOL, indent=2).encode(), "pool.json", "acme", "web")
    instance = parse_instance(json.dumps(INSTANCE).encode(), "instance.json", REF)

    assert tenant.net == NET
    assert tenant.quotas.max_mem_mib == 2**64 - 1
    assert (pool.ready, pool.agent_port, pool.serial) == ("api", 6000, False)
    assert pool.runtime_policy.drain_timeout_seconds == 5
    assert pool.runtime_policy.graceful_shutdown_seconds == 15
    assert instance.net.tap_dev == "tn259i7"
    assert instance.extra == {key: INSTANCE[key] for key in ("idle_metrics", "tags", "extra")}


def test_optional_fields_may_be_missing() -> None:
    pool = {key: POOL[key] for key in ("pool_id", "tenant_id", "instance_resources")}

    read = parse_pool(json.dumps(pool).encode(), "pool.json", "acme", "web")

    assert (read.ready, read.agent_port, read.seccomp_policy) == ("agent", 5252, "baseline")


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("tenant.json", "tenant_id", "other"),
        ("tenant.json", "tenant_id", GONE),
        ("tenant.json", "quotas", GONE),
        ("tenant.json", "quotas.max_vcpus", -1),
        ("tenant.json", "quotas.max_vcpus", 2**32),
        ("tenant.json", "quotas.max_mem_mib", -1),
        ("tenant.json", "quotas.max_running", 1.0),
        ("tenant.json", "quotas.max_running", True),
        ("tenant.json", "net", GONE),
        ("tenant.json", "net.tenant_net_id", 4096),
        ("tenant.json", "net.bridge_name", "eth0"),
        ("tenant.json", "net.ipv4_subnet", "10.241.3.1/24"),
        ("tenant.json", "net.gateway_ip", "10.241.4.1"),
        ("pool.json", "pool_id", "db"),
        ("pool.json", "tenant_id", "../acme"),
        ("pool.json", "instance_resources.vcpus", 0),
        ("pool.json", "instance_resources.vcpus", 33),
        ("pool.json", "instance_resources.vcpus", -1),
        ("pool.json", "instance_resources.vcpus", "2"),
        ("pool.json", "instance_resources.mem_mib", 0),
        ("pool.json", "instance_resources.mem_mib", 2**32),
        ("pool.json", "instance_resources.data_disk_mib", -1),
        ("pool.json", "runtime_policy.drain_timeout_seconds", -1),
        ("pool.json", "seccomp_policy", "off"),
        ("pool.json", "metadata.tags", ["x"]),
        ("pool.json", "metadata", None),
        ("instance.json", "instance_id", "i-2"),
        ("instance.json", "tenant_id", "acme\n"),
        ("instance.json", "status", "failed"),
        ("instance.json", "status", GONE),
        ("instance.json", "net", GONE),
        ("instance.json", "net.cidr", 256),
        ("instance.json", "net.guest_ip", 7),
        ("instance.json", "firecracker_pid", -1),
        ("instance.json", "revision_hash", "../../etc"),
        ("instance.json", "revision_hash", "ABC"),
        ("instance.json", "revision_hash", ""),
    ],
)
def test_a_hostile_value_is_invalid_and_names_file_and_field(
    file: str, field: str, value: object
) -> None:
    sound, parse = FILES[file]
    content = copy.deepcopy(sound)
    *directories, last = field.split(".")
    place = content
    for directory in directories:
        place = place[directory]
    if value is GONE:
        del place[last]
    else:
        place[last] = value

    error = refused(parse, json.dumps(content).encode())

    assert error.path == f"{file}: $.{field}"


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("hostd.ready", "soon"),
        ("hostd.ready", ""),
        ("hostd.serial", "1"),
        ("hostd.agent_port", "0"),
        ("hostd.agent_port", "65536"),
        ("hostd.agent_port", "-1"),
        ("hostd.agent_port", "5252\n"),
        ("hostd.agent_port", "\u0665\u0662"),
        ("hostd.agent_port", "9" * 5000),
    ],
)
def test_a_hostd_tag_accepts_only_its_values(tag: str, value: str) -> None:
    content = POOL | {"metadata": {"tags": {tag: value}}}

    error = refused(FILES["pool.json"][1], json.dumps(content).encode())

    assert error.path == f"pool.json: $.metadata.tags['{tag}']"
    assert len(str(error)) < 200


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff{}",
        b"{}{}",
        b"[" * 5000,
        b'{"a":' * 5000,
        b"{}" + b" " * 262_144,
        b'{"x":' + b"9" * 5000 + b"}",
    ],
    ids=lambda data: ascii(data[:12]),
)
def test_anything_but_a_json_object_within_limits_is_invalid(file: str, data: bytes) -> None:
    error = refused(FILES[file][1], data)

    assert error.path == f"{file}: $"


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (b'{"tenant_id":"acme","tenant_id":"acme"}', "tenant.json: $.tenant_id"),
        (b'{"net":{"a":1,"a":2}}', "tenant.json: $.net.a"),
        (b'{"x":NaN}', "tenant.json: $.x"),
        (b'{"x":[1,-Infinity]}', "tenant.json: $.x[1]"),
        (b'{"x":"\\ud800"}', "tenant.json: $.x"),
        (b'{"x":' + b"[" * 20 + b"]" * 20 + b"}", "tenant.json: $.x" + "[0]" * 15),
    ],
)
def test_an_error_in_a_file_has_its_path(data: bytes, path: str) -> None:
    assert refused(FILES["tenant.json"][1], data).path == path


def test_a_bomb_of_small_things_costs_no_more_than_its_size() -> None:
    bomb = b'{"x":[' + b"{}," * 80_000 + b"{}]}"

    def cost_s() -> float:
        started = time.thread_time()
        refused(FILES["pool.json"][1], bomb)
        return time.thread_time() - started

    assert min(cost_s() for _ in range(5)) < 0.001


def test_the_network_of_an_instance_is_the_derived_one() -> None:
    instance = parse_instance(json.dumps(INSTANCE).encode(), "instance.json", REF)

    check_instance_net(instance, NET, offset_of(instance.net.guest_ip, NET))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tap_dev", "tn3i7"),
        ("tap_dev", "eth0"),
        ("mac", "02:fc:01:03:00:08"),
        ("mac", "02:FC:01:03:00:07"),
        ("guest_ip", "10.241.3.8"),
        ("gateway_ip", "10.241.3.2"),
        ("cidr", 23),
    ],
)
def test_another_network_than_the_derived_one_is_refused(field: str, value: object) -> None:
    content = INSTANCE | {"net": INSTANCE["net"] | {field: value}}
    instance = parse_instance(json.dumps(content).encode(), "instance.json", REF)

    with pytest.raises(DecodeError) as caught:
        check_instance_net(instance, NET, 7)

    assert caught.value.path == f"instance.json: $.net.{field}"


def numbers_of(kind: type[msgspec.Struct], path: str = "") -> list[str]:
    """The path of every number in a file's type."""
    found: list[str] = []
    struct = type_info(kind)
    assert isinstance(struct, StructType)
    for field in struct.fields:
        types = field.type.types if isinstance(field.type, UnionType) else (field.type,)
        for each in types:
            if isinstance(each, IntType):
                found.append(f"{path}{field.encode_name}")
            elif isinstance(each, StructType):
                found += numbers_of(each.cls, f"{path}{field.encode_name}.")
    return found


NUMBERS = [
    (file, path)
    for file, kind in (
        ("tenant.json", TenantConfig),
        ("pool.json", PoolSpec),
        ("instance.json", InstanceFile),
    )
    for path in numbers_of(kind)
]


@pytest.mark.parametrize("value", [2**64, 10**400, -1])
@pytest.mark.parametrize(("file", "path"), NUMBERS)
def test_every_number_has_bounds_and_is_named(file: str, path: str, value: int) -> None:
    document = copy.deepcopy({"tenant.json": TENANT, "pool.json": POOL, "instance.json": INSTANCE})
    at = document[file]
    *above, last = path.split(".")
    for key in above:
        at = at.setdefault(key, {})
    at[last] = value
    parse: dict[str, Callable[[bytes], object]] = {
        "tenant.json": lambda data: parse_tenant(data, file, "acme"),
        "pool.json": lambda data: parse_pool(data, file, "acme", "web"),
        "instance.json": lambda data: parse_instance(data, file, REF),
    }

    with pytest.raises(DecodeError) as caught:
        parse[file](json.dumps(document[file]).encode())

    assert caught.value.path == f"{file}: $.{path}"


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("instance_resources.mem_mib", 2**24),
        ("instance_resources.data_disk_mib", 2**24 - 1),
        ("runtime_policy.drain_timeout_seconds", 86_400),
        ("runtime_policy.graceful_shutdown_seconds", 86_400),
    ],
)
def test_the_bounds_of_a_pool_fit_their_use(path: str, most: int) -> None:
    table, name = path.split(".")
    for value, valid in ((most, True), (most + 1, False)):
        pool = copy.deepcopy(POOL)
        pool[table][name] = value
        data = json.dumps(pool).encode()
        if valid:
            parse_pool(data, "pool.json", "acme", "web")
            continue
        with pytest.raises(DecodeError) as caught:
            parse_pool(data, "pool.json", "acme", "web")
        assert caught.value.path == f"pool.json: $.{path}"
