"""How a worker that cannot start ends: exit code and log event."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from handlers.host.lock import HostLock
from schemas.codes import EXIT_CODES, Code
from schemas.settings import HostSettings
from tests.unit.test_preflight import settings_in
from worker import logs
from worker.main import run
from worker.preflight import prepare_dirs


def test_a_second_worker_ends_with_the_code_of_a_conflict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_in(tmp_path)
    prepare_dirs(settings)
    logs.configure("info")

    with HostLock(settings.paths.run):
        assert run(settings) == EXIT_CODES[Code.CONFLICT]

    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["event"] == "worker.start_failed"


def test_a_host_that_is_not_fit_ends_with_the_code_of_a_fault(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)

    assert run(replace(settings, host=HostSettings(id="h1"))) == EXIT_CODES[Code.HOST_FAULT]
