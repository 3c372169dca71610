"""`hostd logs`, on files."""

import json
from pathlib import Path

import pytest

from handlers.host.inventory import Inventory
from schemas.settings import Settings
from tests.unit.cli.hostd import hostd
from worker.cli import local


def test_logs_prints_the_latest_launch_or_is_not_found(tmp_path: Path) -> None:
    directory = tmp_path / "logs/acme/web/i-1"
    directory.mkdir(parents=True)
    for launch in (9, 10):
        (directory / f"{launch}.log").write_text(f"launch {launch}\n")
    place = {"HOSTD_PATHS_STATE": str(tmp_path)}

    last = hostd("logs", "acme", "web", "i-1", **place)
    other = hostd("logs", "acme", "web", "i-1", "--launch", "9", "--json", **place)
    none = hostd("logs", "acme", "web", "i-2", **place)

    assert last.output == "launch 10\n"
    assert json.loads(other.output) == {"log": "launch 9\n"}
    assert none.exit_code == 13

    gone = hostd("logs", "acme", "web", "i-1", "--launch", "7", **place)

    assert gone.exit_code == 13
    assert "no VMM log of launch 7 of acme/web/i-1" in gone.stderr
    assert "launches with a log: 9, 10" in gone.stderr


def test_the_names_of_an_inventory_do_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(settings: Settings) -> Inventory:
        return Inventory(temp=("/s/\x1b[2J\n.x.part",))

    monkeypatch.setattr(local, "collect", found)

    named = hostd("inventory", "--names")

    assert named.stdout.splitlines()[-2:] == ["  /s/\\x1b[2J\\n.x.part", "warm            0"]
