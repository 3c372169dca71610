"""The subcommands, run by root, write and read a tenant's files by the worker's rules."""

import ast
import os
from pathlib import Path

import pytest

from schemas.requests import InstanceRef
from tests.kernel.storage.store_host import write
from worker.cli import commands
from worker.cli.context import CliError
from worker.cli.seed import Seed, write_seed

REF = InstanceRef("acme", "web", "i-1")
AGENTD = 1234
CLI = Path(__file__).parents[3] / "worker" / "cli"
POOL = "pools/web"
# Every directory and file that `hostd seed` makes or reads, below the tenant's directory.
DIRECTORIES = [
    "",
    "pools",
    POOL,
    f"{POOL}/artifacts",
    f"{POOL}/artifacts/revisions",
    f"{POOL}/instances",
    f"{POOL}/instances/i-1",
    f"{POOL}/instances/i-1/volumes",
]
FILES = ["tenant.json", f"{POOL}/pool.json", f"{POOL}/instances/i-1/instance.json"]
REPLACED = ["secrets.json", f"{POOL}/artifacts/current"]
# What a subcommand opens by a plain path: what the operator named, never below the data root.
OPERATORS = {
    ("seed.py", "open"),
    ("provision.py", "os.path.abspath"),  # --check-creds
    ("context.py", "os.path.exists"),
    ("journal.py", "os.stat"),  # a backup of the journal
    ("journal.py", "os.makedirs"),  # [paths] run, for the lock
    ("context.py", "os.environ"),
}
NO_PATH = ("os.environ", "os.urandom", "os.geteuid")
OPENERS = {"open", "Path", "os", "shutil", "tempfile", "pathlib", "glob", "io"}


def seed(data: Path, kernel: Path) -> None:
    artifacts = {"vmlinux": str(kernel), "rootfs.ext4": str(kernel)}
    write_seed(str(data), Seed(REF, 7, artifacts=artifacts, secrets=b"{}"))


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return write(tmp_path / "kernel", b"\x7fELF")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """As on a host: agentd's directory."""
    data = tmp_path / "mvm"
    data.mkdir()
    os.chown(data, AGENTD, AGENTD)
    return data


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What is root's: an empty directory and a file."""
    outside = tmp_path / "outside"
    write(outside / "file", b"untouched")
    (outside / "directory").mkdir()
    return outside


def untouched(outside: Path) -> bool:
    files = sorted(path.relative_to(outside) for path in outside.rglob("*"))
    return files == [Path("directory"), Path("file")] and (
        (outside / "file").read_bytes() == b"untouched"
    )


def test_all_that_is_seeded_belongs_to_the_owner_of_the_data_root(data: Path, kernel: Path) -> None:
    seed(data, kernel)

    made = [data / "tenants", *(data / "tenants").rglob("*")]
    assert {path.lstat().st_uid for path in made} == {AGENTD}
    assert len([path for path in made if path.is_file() and not path.is_symlink()]) == 6


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_is_a_link_is_not_entered(
    data: Path, kernel: Path, outside: Path, name: str
) -> None:
    path = data / "tenants" / "acme" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside / "directory")

    with pytest.raises(CliError, match=r"symlink|not a directory") as caught:
        seed(data, kernel)

    assert caught.value.code == "invalid"
    assert untouched(outside)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_a_link_is_neither_read_nor_written(
    data: Path, kernel: Path, outside: Path, name: str
) -> None:
    seed(data, kernel)
    path = data / "tenants" / "acme" / name
    path.unlink()
    path.symlink_to(outside / "file")

    with pytest.raises(CliError, match="is a symlink") as caught:
        seed(data, kernel)

    assert caught.value.code == "invalid"
    assert untouched(outside)


@pytest.mark.parametrize("name", REPLACED)
def test_a_link_in_the_place_of_what_is_replaced_is_not_followed(
    data: Path, kernel: Path, outside: Path, name: str
) -> None:
    path = data / "tenants" / "acme" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(outside / "file")

    seed(data, kernel)

    assert untouched(outside)
    assert os.path.islink(path) == (name != "secrets.json")


def test_a_full_directory_that_another_filled_is_bounded(data: Path, kernel: Path) -> None:
    seed(data, kernel)
    instances = data / "tenants" / "acme" / POOL / "instances"
    for number in range(4097):
        (instances / f"x{number}").touch()

    with pytest.raises(CliError, match="more than 4096 entries"):
        write_seed(str(data), Seed(InstanceRef("acme", "web", "i-2"), 7))


@pytest.mark.parametrize("spoil", ["link", "of root"])
def test_the_net_of_a_file_that_is_not_agentds_is_not_sent(
    data: Path, kernel: Path, outside: Path, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed(data, kernel)
    monkeypatch.setenv("HOSTD_PATHS_DATA", str(data))
    tenant = data / "tenants" / "acme" / "tenant.json"
    assert commands.tenant_net(None, "acme").tenant_net_id == 7
    if spoil == "link":
        tenant.unlink()
        tenant.symlink_to(outside / "file")
    else:
        os.chown(tenant, 0, 0)

    with pytest.raises(CliError) as caught:
        commands.tenant_net(None, "acme")

    assert caught.value.code == "invalid"


def test_no_subcommand_opens_a_path_of_the_data_root_itself() -> None:
    """Only what the operator named is opened by its path; the rest goes through the mechanisms."""
    found: set[tuple[str, str]] = set()
    for path in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = ast.unparse(node.func)
                if name.partition(".")[0] in OPENERS:
                    found.add((path.name, ".".join(name.split(".")[:3])))

    assert {each for each in found if not each[1].startswith(NO_PATH)} == {
        each for each in OPERATORS if each[1] != "os.environ"
    }
