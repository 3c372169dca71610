"""`hostd check-config`: the effective settings, as TOML and JSON."""

import json
import tomllib
from pathlib import Path

from tests.unit.cli.hostd import hostd
from worker.settings import keys


def test_check_config_prints_toml_that_it_reads_again(tmp_path: Path) -> None:
    first = hostd("check-config", HOSTD_LIMITS_BOOTS="3")
    assert first.exit_code == 0
    file = tmp_path / "hostd.toml"
    file.write_text(first.output)

    again = hostd("check-config", "--config", str(file))

    assert tomllib.loads(again.output) == tomllib.loads(first.output)
    assert tomllib.loads(again.output)["limits"]["boots"] == 3


def test_check_config_prints_unit_and_origin_of_each_setting() -> None:
    result = hostd("check-config", "--json", HOSTD_LIMITS_BOOTS="3")

    shown = json.loads(result.output)
    assert set(shown) == {key.dotted for key in keys()}
    assert shown["limits.boots"]["from"] == "HOSTD_LIMITS_BOOTS"
    assert shown["limits.shutdown_s"] == {
        "value": 20.0,
        "unit": "seconds",
        "from": "default",
        "default": 20.0,
    }
    assert shown["limits.mem_reserve_mib"]["unit"] == "MiB"
