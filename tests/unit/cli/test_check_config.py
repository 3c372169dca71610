"""The command line as a whole: settings, exit codes, help."""

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from schemas.codes import EXIT_CODES, EXIT_NO_ANSWER, Code
from worker.cli.context import exit_code
from worker.cli.main import COMMANDS, main
from worker.settings import keys

HOST = {"HOSTD_HOST_ID": "h1"}


def hostd(*args: str, **env: str) -> Result:
    return CliRunner().invoke(main, args, env={**HOST, "HOSTD_CONFIG": None, **env})


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


@pytest.mark.parametrize("place", ["before", "after", "environment"])
def test_the_settings_file_is_named_before_or_after_the_subcommand_or_by_the_environment(
    tmp_path: Path, place: str
) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[host]\ncell = "c7"\n')
    args = {
        "before": ("--config", str(file), "check-config", "--json"),
        "after": ("check-config", "--json", "--config", str(file)),
        "environment": ("check-config", "--json"),
    }[place]

    result = hostd(*args, **({"HOSTD_CONFIG": str(file)} if place == "environment" else {}))

    assert json.loads(result.output)["host.cell"]["value"] == "c7"


def test_wrong_settings_are_invalid_and_name_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[host]\ncel = 1\n")

    result = hostd("check-config", "--config", str(file))

    assert result.exit_code == 10
    assert result.stderr == f"invalid: {file}: host.cel: no such setting\n"
    assert result.stdout == ""


def test_with_json_a_failure_is_json_too(tmp_path: Path) -> None:
    result = hostd("check-config", "--json", "--config", str(tmp_path / "none"))

    assert result.exit_code == 10
    assert json.loads(result.stdout)["error"]["code"] == "invalid"


def test_without_a_bus_there_is_no_answer() -> None:
    result = hostd("ping", "--url", "nats://127.0.0.1:1")

    assert result.exit_code == EXIT_NO_ANSWER
    assert "127.0.0.1:1" in result.stderr


def test_usage_errors_exit_with_2() -> None:
    assert hostd("start", "t", "p").exit_code == 2
    assert hostd("show", "t", "p").exit_code == 2
    assert hostd("events", "--no-follow").exit_code == 2
    assert hostd("nonsense").exit_code == 2


def test_every_subcommand_loads_and_explains_itself() -> None:
    for name in COMMANDS:
        result = hostd(name, "--help")
        assert result.exit_code == 0, (name, result.output)
        assert "Usage: " in result.output
        assert "--json" in result.output, name


def test_the_help_lists_every_subcommand_with_its_summary_in_full() -> None:
    lines = hostd("--help").output.splitlines()

    for name in COMMANDS:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith("."), line


def test_every_code_has_its_exit_code_and_an_unknown_one_counts_as_internal() -> None:
    assert {exit_code(code.value) for code in Code} == set(EXIT_CODES.values())
    assert exit_code("from_the_future") == EXIT_CODES[Code.INTERNAL]


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
