"""The demo's check of the resumed guest, and the choice of the lab."""

import os
import sys
from pathlib import Path

import click
import pytest

from tests.unit.cli.hostd import hostd
from worker.demo import command
from worker.demo.command import check_resumed
from worker.demo.progress import DemoFailed

AWAKE = {"counter": 5, "boot_id": "a"}


@pytest.mark.parametrize(
    ("woken", "detail", "complaint"),
    [
        ({"counter": 6, "boot_id": "b"}, {}, "booted, not resumed"),
        ({"counter": 5, "boot_id": "a"}, {}, "counter 5 after wake"),
        ({"counter": 6, "boot_id": "a"}, {"agent_failed": "no"}, "wake notification failed"),
        ({"counter": 6, "boot_id": "a", "unix_nanos": 0}, {}, "clock is off"),
    ],
)
def test_a_guest_that_was_not_resumed_fails_the_demo(
    woken: dict[str, object], detail: dict[str, object], complaint: str
) -> None:
    with pytest.raises(DemoFailed, match=complaint):
        check_resumed(AWAKE, woken, {"detail": detail})


def test_where_kvm_cannot_run_linux_the_demo_is_executed_in_the_lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Became(Exception):
        """execv does not return."""

    def execv(path: str, argv: list[str]) -> None:
        raise Became(path, argv, os.getcwd())

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.chdir("/")
    with pytest.raises(click.ClickException, match="requires a source checkout"):
        command.hand_over_to_lab(str(tmp_path), as_json=False)
    (tmp_path / "tests/lab").mkdir(parents=True)
    (tmp_path / "tests/lab/run.py").touch()

    with pytest.raises(Became) as became:
        command.hand_over_to_lab(str(tmp_path), as_json=True)

    arguments = ["-m", "tests.lab.run", "--", "hostd", "demo", "--here", "--json"]
    assert became.value.args == (sys.executable, [sys.executable, *arguments], str(tmp_path))


@pytest.mark.parametrize("args", [(), ("--guest", "mini"), ("--here",)])
def test_the_demo_requires_root_before_anything_else(
    args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    result = hostd("demo", *args)

    assert result.exit_code == 20
    assert result.stderr.startswith("host_fault: cannot run the demo as an ordinary user")
    assert "run it as root" in result.stderr
