"""`hostd doctor`: the findings of host and worker, worst first, and an exit code of 1."""

import asyncio
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.unit.cli.hostd import hostd
from tests.unit.control.control_socket import control_server
from worker.cli import doctor
from worker.control.routes import Answer, Body, Route
from worker.doctor.findings import Finding, Severity

INFO = Finding(Severity.INFO, "drain", "drained", "so", "hostd undrain")
ERROR = Finding(Severity.ERROR, "outbox", "held", "so", "look")


@pytest.fixture(autouse=True)
def sound_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is the machine's own: it is tested elsewhere."""

    class Sound:
        def __init__(self, settings: object) -> None: ...

        def all(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(doctor, "HostChecks", Sound)


async def run(tmp_path: Path, *args: str, answer: dict[str, Any]) -> Result:
    async def checks(body: Body) -> Answer:
        return answer

    async with control_server(tmp_path, Route("GET", "/v1/doctor", checks)):
        return await asyncio.to_thread(hostd, "doctor", *args, HOSTD_PATHS_RUN=str(tmp_path))


def facts(*findings: Finding, of: str | None = None) -> dict[str, Any]:
    listed = [{name: getattr(each, name) for name in each.__struct_fields__} for each in findings]
    return {"version": of or version("hostd"), "findings": listed}


async def test_a_sound_host_is_ok(tmp_path: Path) -> None:
    result = await run(tmp_path, answer=facts())

    assert (result.exit_code, result.stdout) == (0, "ok: no findings\n")


async def test_findings_are_shown_worst_first_and_the_exit_code_is_1(tmp_path: Path) -> None:
    result = await run(tmp_path, answer=facts(INFO, ERROR))

    assert result.exit_code == 1
    assert result.stdout == (
        "error: held [outbox]\n  why: so\n  run: look\n"
        "info: drained [drain]\n  why: so\n  run: hostd undrain\n"
        "1 error, 1 info\n"
    )


async def test_what_somebody_chose_needs_no_action(tmp_path: Path) -> None:
    result = await run(tmp_path, "--json", answer=facts(INFO))

    assert result.exit_code == 0
    assert json.loads(result.stdout)["findings"][0]["run"] == "hostd undrain"


async def test_a_worker_of_another_version_is_a_warning(tmp_path: Path) -> None:
    result = await run(tmp_path, "--json", answer=facts(of="0.0.1"))

    (finding,) = json.loads(result.stdout)["findings"]
    assert (result.exit_code, finding["check"]) == (1, "version")
    assert finding["run"] == "systemctl restart hostd"


@pytest.mark.parametrize("answer", [{}, {"findings": [{"severity": "bad"}]}])
async def test_an_answer_of_another_version_is_a_finding(
    tmp_path: Path, answer: dict[str, Any]
) -> None:
    result = await run(tmp_path, "--json", answer=answer)

    (finding,) = json.loads(result.stdout)["findings"]
    assert (result.exit_code, finding["check"]) == (1, "worker")


def test_no_worker_is_an_error_unless_none_is_meant_to_run(tmp_path: Path) -> None:
    missing = hostd("doctor", HOSTD_PATHS_RUN=str(tmp_path))
    meant = hostd("doctor", "--no-worker", HOSTD_PATHS_RUN=str(tmp_path))

    assert (missing.exit_code, meant.exit_code) == (1, 0)
    assert "systemctl status hostd" in missing.stdout


def test_settings_that_cannot_be_read_are_a_finding() -> None:
    result = hostd("doctor", "--json", HOSTD_LIMITS_BOOTS="many")

    (finding,) = json.loads(result.stdout)["findings"]
    assert (result.exit_code, finding["check"]) == (1, "settings")
    assert finding["run"] == "hostd check-config"
