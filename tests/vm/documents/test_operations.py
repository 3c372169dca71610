"""The blocks of docs/operations.md, on a real host or in a sandbox."""

import json
from pathlib import Path

from schemas import codec
from schemas.envelopes import Command
from schemas.requests import SetupNetwork
from tests.console import steps
from tests.constants import NET
from tests.crash.kills import until
from tests.guests.cache import BUILD, REPOSITORY
from tests.guests.firecracker import FIRECRACKER, JAILER, PINNED
from tests.live_host import live_host
from tests.vm.documents.copying import begin, copy
from tests.vm.documents.sandbox import sandbox
from tests.vm.runbooks.faults import host_with_operator
from tests.vm.runbooks.operator import operator_of

PAGE = REPOSITORY / "docs" / "operations.md"


async def test_a_host_is_taken_out_of_service_and_back_by_copying() -> None:
    (step,) = steps(PAGE, "test_a_host_is_taken_out_of_service_and_back_by_copying")
    async with host_with_operator() as (host, operator):
        drained, _, _, back = await operator.copy(step.block.text)

        status = (await host.describe())["status"]
    assert "ok: no instance has a VMM" in drained
    assert (back, status) == ("ok\n", "sleeping")


async def test_the_control_socket_is_asked_by_copying() -> None:
    (step,) = steps(PAGE, "test_the_control_socket_is_asked_by_copying")
    async with host_with_operator(running=False) as (_, operator):
        (dump,) = await operator.copy(step.block.text)

    assert "journal" in json.loads(dump)


async def test_dead_letters_are_worked_off_by_copying(tmp_path: Path) -> None:
    (step,) = steps(PAGE, "test_dead_letters_are_worked_off_by_copying")
    for name in ("admin.creds", "agentd-h1.creds"):
        (tmp_path / name).write_text("live:host\n")
        (tmp_path / name).chmod(0o600)
    words = {" 17": " 1", " admin.creds": f" {tmp_path}/admin.creds"}
    words |= {" agentd-h1.creds": f" {tmp_path}/agentd-h1.creds"}
    async with (
        live_host() as host,
        operator_of(host, words=words) as operator,
    ):
        subject = f"{host.subjects.root}.{host.subjects.host_id}.cmd.network.other"
        stray = Command(id="c-1", request=SetupNetwork("acme", NET))
        await host.publish_raw(subject, codec.encode_command(stray))  # not its lane
        await until(lambda: '"command.refused"' in host.log(), "the refusal")
        listed, shown, decoded, replayed, dropped = await operator.copy(step.block.text)

    assert "network.other" in listed
    assert "c-1" in shown
    assert json.loads(decoded)["id"] == "c-1"
    assert subject in replayed
    assert "dropped" in dropped


async def test_firecracker_versions_are_installed_side_by_side_by_copying(tmp_path: Path) -> None:
    (step,) = steps(PAGE, "test_firecracker_versions_are_installed_side_by_side_by_copying")
    words = {
        "firecracker-v1.16.1-x86_64": str(FIRECRACKER),
        "jailer-v1.16.1-x86_64": str(JAILER),
        "/opt/firecracker": str(tmp_path),
        "v1.16.1": f"v{PINNED}",
    }
    async with (
        live_host(worker=False, versions_dir=str(tmp_path)) as host,
        operator_of(host, words=words) as operator,
    ):
        await operator.copy(step.block.text)
        await host.start_worker()

        (version,) = (await host.ping())["detail"]["vmm_versions"]
    assert (version["version"], version["state"]) == (PINNED, "installed")


async def test_rules_and_dashboard_are_installed_by_copying(tmp_path: Path) -> None:
    (step,) = steps(PAGE, "test_rules_and_dashboard_are_installed_by_copying")
    config = "rule_files: [ /etc/prometheus/hostd.rules.yml, /etc/prometheus/hostd.recording.yml ]"
    async with sandbox(tmp_path) as shell:
        await begin(shell)
        await copy(step, shell)

        checked = await shell.type(
            f"echo '{config}' > /etc/prometheus/prometheus.yml;"
            f" {BUILD}/tools/promtool check config /etc/prometheus/prometheus.yml"
        )
        path = await shell.type("grep -h path: /etc/grafana/provisioning/dashboards/hostd.yml")
        placed = await shell.type("ls /var/lib/grafana/dashboards/hostd")
    assert checked[0] == 0, checked
    assert checked[1].count("rules found") == 2
    assert "/var/lib/grafana/dashboards/hostd" in path[1]
    assert placed == (0, "hostd.json\n")


async def test_installing_from_the_index_by_copying(tmp_path: Path) -> None:
    (step,) = steps(PAGE, "test_installing_from_the_index_by_copying")
    async with sandbox(tmp_path, online=True) as shell:
        await begin(shell)
        built = await shell.type(
            ".venv/bin/python -m build --wheel --no-isolation --outdir . > /dev/null 2>&1;"
            " echo live:host > h1.creds; systemctl() { echo systemctl $*; }"
        )
        assert built == (0, "")
        output = await copy(step, shell)
        unit = await shell.type("systemd-analyze verify /etc/systemd/system/hostd.service")

    assert output.endswith("systemctl enable --now hostd\n")
    assert "hostd" not in unit[1]
