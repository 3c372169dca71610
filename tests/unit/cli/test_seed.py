"""`hostd seed` writes what agentd does: the contract's fields, formulas and layout."""

import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas import naming
from schemas.files import InstanceFile, PoolSpec, TenantConfig
from schemas.requests import InstanceRef, TenantNet
from tests.constants import REF
from tests.unit.cli.hostd import hostd
from worker.cli.context import CliError
from worker.cli.seed import Seed, net_of, write_seed

REF_WORDS = ("acme", "web", "i-1")


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


@pytest.fixture
def images(tmp_path: Path) -> dict[str, str]:
    files = {"vmlinux": b"kernel", "rootfs.ext4": b"root" * 1000}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return {name: str(tmp_path / name) for name in files}


def test_the_files_have_the_contracts_types_and_derived_names(tmp_path: Path) -> None:
    seeded = write_seed(str(tmp_path), Seed(REF, 300, mem_mib=256, tags={"hostd.ready": "api"}))

    tenant_dir = tmp_path / "tenants/acme"
    instance_dir = tenant_dir / "pools/web/instances/i-1"
    tenant = msgspec.json.decode((tenant_dir / "tenant.json").read_bytes(), type=TenantConfig)
    pool = msgspec.json.decode((tenant_dir / "pools/web/pool.json").read_bytes(), type=PoolSpec)
    instance = msgspec.json.decode((instance_dir / "instance.json").read_bytes(), type=InstanceFile)
    assert tenant.net == TenantNet(300, "10.241.44.0/24", "10.241.44.1", "br-tenant-300")
    assert (pool.instance_resources.mem_mib, pool.ready, pool.agent_port) == (256, "api", 5252)
    assert instance.status == "created"
    assert instance.net.tap_dev == naming.tap_name(300, 3) == seeded.tap
    assert instance.net.mac == "02:fc:01:2c:00:03"
    assert (instance.net.guest_ip, instance.net.cidr) == ("10.241.44.3", 24)
    assert (instance_dir / "volumes").is_dir()


@pytest.mark.parametrize(
    ("net_id", "subnet"),
    [
        (0, "10.240.0.0/24"),
        (255, "10.240.255.0/24"),
        (256, "10.241.0.0/24"),
        (4095, "10.255.255.0/24"),
    ],
)
def test_subnets_follow_agentds_formula(net_id: int, subnet: str) -> None:
    assert net_of(net_id).ipv4_subnet == subnet


def test_each_instance_of_a_tenant_gets_the_first_free_address(tmp_path: Path) -> None:
    addresses = [
        write_seed(str(tmp_path), Seed(InstanceRef("acme", pool, name), 7)).guest_ip
        for pool, name in (("web", "a"), ("web", "b"), ("db", "a"), ("web", "a"))
    ]

    assert addresses == ["10.240.7.3", "10.240.7.4", "10.240.7.5", "10.240.7.3"]


def test_current_is_a_relative_symlink_to_the_hash_of_the_content(
    tmp_path: Path, images: dict[str, str]
) -> None:
    root = tmp_path / "data"
    first = write_seed(str(root), Seed(REF, 7, artifacts=images)).revision
    assert first is not None
    artifacts = root / "tenants/acme/pools/web/artifacts"
    assert os.readlink(artifacts / "current") == f"revisions/{first}"
    assert naming.REVISION_PATTERN.fullmatch(first)
    assert (artifacts / "current/vmlinux").read_bytes() == b"kernel"

    Path(images["vmlinux"]).write_bytes(b"newer kernel")
    second = write_seed(str(root), Seed(REF, 7, artifacts=images)).revision

    assert second != first
    assert (artifacts / "current/vmlinux").read_bytes() == b"newer kernel"
    assert (artifacts / f"revisions/{first}/vmlinux").read_bytes() == b"kernel"
    assert write_seed(str(root), Seed(REF, 7)).revision == second


def test_existing_files_are_kept(tmp_path: Path) -> None:
    write_seed(str(tmp_path), Seed(REF, 7, tags={"a": "1"}))
    path = tmp_path / "tenants/acme/pools/web/instances/i-1/instance.json"
    mine = {**read(path), "status": "running", "foreign": [1]}
    path.write_text(json.dumps(mine))

    write_seed(str(tmp_path), Seed(REF, 7, vcpus=2, tags={"b": "2"}))

    assert read(path) == mine
    pool = read(tmp_path / "tenants/acme/pools/web/pool.json")
    assert pool["metadata"]["tags"] == {"a": "1", "b": "2"}
    assert pool["instance_resources"]["vcpus"] == 2


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tenant.json", {"net": None}, "tenant.json: $.net"),
        ("tenant.json", {"net": []}, "tenant.json: $.net"),
        ("pools/web/pool.json", {"metadata": 3}, "web/pool.json: $.metadata"),
        ("pools/web/instances/i-1/instance.json", {"net": None}, "i-1/instance.json: $.net"),
    ],
)
def test_a_file_that_the_worker_would_refuse_is_invalid(
    tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    write_seed(str(tmp_path), Seed(REF, 300))
    path = tmp_path / "tenants/acme" / file
    path.write_text(json.dumps(read(path) | change))

    with pytest.raises(CliError, match=r"^invalid: ") as refused:
        write_seed(str(tmp_path), Seed(REF, 300))
    assert message in refused.value.message


def test_what_agentd_adds_to_the_files_is_no_error(tmp_path: Path) -> None:
    write_seed(str(tmp_path), Seed(REF, 300))
    for name, change in (("tenant.json", {"net": {"vlan": 3}}), ("pools/web/pool.json", {})):
        path = tmp_path / "tenants/acme" / name
        there = read(path)
        for key, more in change.items():
            there[key] |= more
        path.write_text(json.dumps(there | {"metadata": {"tags": {}, "owner": "x"}}))

    assert write_seed(str(tmp_path), Seed(REF, 300)).guest_ip == "10.241.44.3"


def test_seeds_at_once_wait_for_each_other(tmp_path: Path, images: dict[str, str]) -> None:
    refs = [InstanceRef("acme", "web", f"i-{number}") for number in range(8)]
    with ThreadPoolExecutor(len(refs)) as threads:
        seeds = [Seed(ref, 300, artifacts=images) for ref in refs]
        made = [*threads.map(functools.partial(write_seed, str(tmp_path)), seeds)]

    assert len({each.guest_ip for each in made}) == len(refs)
    assert len({each.revision for each in made}) == 1


def test_another_net_for_a_tenant_is_a_conflict(tmp_path: Path) -> None:
    write_seed(str(tmp_path), Seed(REF, 7))

    with pytest.raises(
        CliError, match=r"tenant\.json: the tenant has net ID 7: use --net-id 7"
    ) as caught:
        write_seed(str(tmp_path), Seed(REF, 8))
    assert caught.value.code == "conflict"


@pytest.mark.parametrize("bad", ["..", "a/b", "", "A", "a\n", "-a", "a" * 64])
def test_an_id_that_could_leave_its_directory_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(CliError, match="invalid: pool ID"):
        write_seed(str(tmp_path), Seed(InstanceRef("acme", bad, "i-1"), 7))
    assert list(tmp_path.iterdir()) == []


def test_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    write_seed(str(tmp_path), Seed(REF, 7, secrets=b'{"k": "v"}'))

    path = tmp_path / "tenants/acme/secrets.json"
    assert path.read_bytes() == b'{"k": "v"}'
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_half_written_file_stays(tmp_path: Path, images: dict[str, str]) -> None:
    root = tmp_path / "data"
    write_seed(str(root), Seed(REF, 7, artifacts=images))

    assert [path for path in root.rglob("*") if ".new" in path.name] == []


def test_a_directory_that_cannot_be_written_is_named_with_what_to_do() -> None:
    # Of /sys not even root can make a directory.
    result = hostd("seed", *REF_WORDS, "--net-id", "7", HOSTD_PATHS_DATA="/sys/hostd")

    assert result.exit_code == 20
    assert result.stderr.startswith("host_fault: cannot make /sys/hostd/tenants/acme: ")
    assert "run as root, or set [paths] data" in result.stderr
