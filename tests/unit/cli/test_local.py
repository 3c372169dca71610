"""`hostd logs`, on files."""

import json
from pathlib import Path

from tests.unit.cli.hostd import hostd


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
