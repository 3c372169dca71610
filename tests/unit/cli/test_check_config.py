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


def test_check_config_shows_what_guests_reach(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[acme]\nallowed = ['192.168.7.9']\ndenied = ['192.0.2.0/24']\n")

    result = hostd(
        "check-config",
        HOSTD_NETWORK_DENIED='["192.168.7.0/24"]',
        HOSTD_NETWORK_POLICY=str(policy),
    )

    assert "#   10.240.0.0/12, 169.254.0.0/16, 192.168.7.0/24\n" in result.stdout
    assert "acme: also allowed 192.168.7.9; also denied 192.0.2.0/24\n" in result.stdout


def test_check_config_refuses_an_invalid_policy(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[acme]\nallowed = ['all']\n")

    result = hostd("check-config", HOSTD_NETWORK_POLICY=str(policy))

    assert result.exit_code == 10
    assert f"invalid [network] policy {policy}: $.acme.allowed[0]" in result.stderr


def test_check_config_refuses_a_policy_that_others_may_write(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("")
    policy.chmod(0o664)

    result = hostd("check-config", HOSTD_NETWORK_POLICY=str(policy))

    assert result.exit_code == 20
    assert "can be written by others" in result.stderr
