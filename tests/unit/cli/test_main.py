"""The command line as a whole: settings file, exit codes, help."""

import json
import os
from pathlib import Path

import pytest

from schemas.codes import EXIT_CODES, EXIT_NO_ANSWER, Code
from schemas.settings import HostSettings, Settings
from tests.unit.cli.hostd import hostd
from worker.cli.context import NoAnswer, exit_code, explained_host
from worker.cli.main import COMMANDS
from worker.settings import MACHINE_ID_FILE, Loaded


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
    assert result.stderr == f"invalid: {file}: host.cel: no such setting; did you mean host.cell?\n"
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


@pytest.mark.parametrize(
    "args",
    [
        ("--mirror-of", ""),
        ("--mirror-of", "not.one.token"),
        ("--mirror-of", "hub", "--server-config"),
        ("--mirror-of", "hub", "--check-creds", "ADMIN=admin.creds"),
        ("--mirrors",),
    ],
)
def test_options_of_mirrors_that_do_not_fit_make_nothing(args: tuple[str, ...]) -> None:
    """An empty one is no cell either: the shell's variable was not set."""
    result = hostd("provision", "--url", "nats://127.0.0.1:1", *args)

    assert result.exit_code == 2
    assert "--mirror" in result.output


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


def test_a_credentials_file_that_is_missing_or_open_to_others_is_invalid(tmp_path: Path) -> None:
    missing = hostd("ls", "--creds", str(tmp_path / "none"), "--url", "nats://127.0.0.1:1")
    (tmp_path / "open").write_text("a:b")
    (tmp_path / "open").chmod(0o644)
    readable = hostd("ls", "--creds", str(tmp_path / "open"), "--url", "nats://127.0.0.1:1")

    assert (missing.exit_code, readable.exit_code) == (10, 10)
    assert f"cannot read NATS credentials file {tmp_path}/none: No such file" in missing.stderr
    assert "chmod 600" in readable.stderr


def test_a_mistyped_subcommand_gets_the_nearest_one() -> None:
    result = hostd("net_up", "t")

    assert result.exit_code == 2
    assert "no such command 'net_up'; did you mean net-up?" in result.stderr


def test_a_missing_settings_file_is_named_with_where_its_path_is_from(tmp_path: Path) -> None:
    file = str(tmp_path / "none")

    by_variable = hostd("check-config", HOSTD_CONFIG=file)
    by_option = hostd("check-config", "--config", file)

    complaint = f"invalid: {file}: cannot read the settings file: No such file or directory"
    assert by_variable.stderr == f"{complaint} (named by $HOSTD_CONFIG)\n"
    assert by_option.stderr == f"{complaint}\n"


def test_the_worker_requires_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    result = hostd("run")

    assert result.exit_code == 20
    assert "run it as root" in result.stderr


def test_without_an_answer_a_host_id_from_the_machine_is_explained() -> None:
    settings = Settings(host=HostSettings(id=32 * "a"))
    machine = Loaded(settings, {"host.id": MACHINE_ID_FILE})
    silence = NoAnswer(f"no worker is running for host {32 * 'a'}")
    explained = f"host a+; the host ID is from {MACHINE_ID_FILE}"

    with pytest.raises(NoAnswer, match=explained), explained_host(machine, None):
        raise silence
    with pytest.raises(NoAnswer, match=r"host a+$"), explained_host(machine, "h2"):
        raise silence
