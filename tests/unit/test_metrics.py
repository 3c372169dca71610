"""Metrics: the contract's names and labels, never a tenant as label."""

import ast
import asyncio
import inspect
import re
from pathlib import Path
from typing import get_args

from prometheus_client.parser import text_string_to_metric_families

from handlers.concurrency import Slots
from handlers.specs import VersionState
from schemas.codes import Code
from schemas.records import Status
from schemas.requests import Request
from schemas.settings import LimitSettings
from worker.main import Worker
from worker.meters.commands import LATER
from worker.meters.resources import RESOURCES, Bounded
from worker.metrics import Metrics, sample_loop_lag

ROOT = Path(__file__).parents[2]
CONTRACT: dict[str, tuple[str, set[str]]] = {
    "hostd_commands": ("counter", {"type", "code"}),
    "hostd_command_duration_seconds": ("histogram", {"type"}),
    "hostd_step_duration_seconds": ("histogram", {"step"}),
    "hostd_retries": ("counter", {"type", "code"}),
    "hostd_lanes": ("gauge", {"state"}),
    "hostd_quarantined_rows": ("gauge", {"table"}),
    "hostd_hung_calls": ("gauge", {"kind"}),
    "hostd_abandoned_calls": ("counter", {"kind"}),
    "hostd_commands_unfinished": ("gauge", set()),
    "hostd_journal_commit_seconds": ("histogram", set()),
    "hostd_outbox_rows": ("gauge", set()),
    "hostd_outbox_held_rows": ("gauge", set()),
    "hostd_bus_connected": ("gauge", set()),
    "hostd_bus_reconnects": ("counter", set()),
    "hostd_bus_permission_errors": ("counter", set()),
    "hostd_bus_pulls": ("counter", set()),
    "hostd_bus_taken_msg_ids": ("counter", set()),
    "hostd_redeliveries": ("counter", set()),
    "hostd_queries_dropped": ("counter", set()),
    "hostd_log_dropped": ("counter", set()),
    "hostd_trace_spans_exported": ("counter", set()),
    "hostd_trace_spans_dropped": ("counter", set()),
    "hostd_trace_spans_failed": ("counter", set()),
    "hostd_envelope_keys_ignored": ("counter", set()),
    "hostd_trace_contexts_ignored": ("counter", {"place", "field"}),
    "hostd_instances": ("gauge", {"status"}),
    "hostd_vmm_exits": ("counter", {"reason"}),
    "hostd_warm_vmms": ("gauge", {"state"}),
    "hostd_warm_vmm_ends": ("counter", {"result"}),
    "hostd_snapshot_duration_seconds": ("histogram", set()),
    "hostd_snapshot_bytes": ("histogram", set()),
    "hostd_network_warnings": ("gauge", set()),
    "hostd_launches_quarantined": ("gauge", set()),
    "hostd_lost_resources": ("gauge", set()),
    "hostd_drift": ("counter", {"kind", "result"}),
    "hostd_vmm_hung": ("gauge", set()),
    "hostd_vmm_probes": ("counter", {"result"}),
    "hostd_orphans": ("gauge", {"kind"}),
    "hostd_orphans_swept": ("counter", {"kind", "result"}),
    "hostd_sweep_stopped": ("gauge", set()),
    "hostd_unrecorded_vmms": ("gauge", set()),
    "hostd_artifact_copied_bytes": ("counter", set()),
    "hostd_disk_free_bytes": ("gauge", set()),
    "hostd_disk_full": ("gauge", set()),
    "hostd_disk_above_watermark": ("gauge", set()),
    "hostd_disk_claimed_bytes": ("gauge", set()),
    "hostd_capacity_limit": ("gauge", {"resource"}),
    "hostd_capacity_used": ("gauge", {"resource"}),
    "hostd_journal_bytes": ("gauge", set()),
    "hostd_bus_pending_commands": ("gauge", set()),
    "hostd_slots_waiting": ("gauge", {"kind"}),
    "hostd_ready": ("gauge", {"check"}),
    "hostd_draining": ("gauge", set()),
    "hostd_vmm_versions": ("gauge", {"version", "state"}),
    "hostd_vmm_versions_in_trouble": ("gauge", set()),
    "hostd_loop_lag_seconds": ("histogram", set()),
    "hostd_build_info": ("gauge", {"version"}),
    "hostd_limits_enforced": ("gauge", set()),
}


def version_state(version: str, state: str = "installed") -> VersionState:
    return VersionState(
        version=version,
        state=state,
        starts=False,
        running=1,
        sleeping=2,
        reason=None,
        sha256={},
        lacks=(),
    )


def used() -> Metrics:
    """A worker's metrics after one of each happened."""
    metrics = Metrics("0.1.0")
    metrics.command_done("StartInstance", Code.OK, 0.02)
    metrics.step("tap", 0.003)
    metrics.retry("StartInstance", Code.UNAVAILABLE)
    metrics.commit(0.0015)
    metrics.bus_totals(reconnects=1, permission_errors=2, pulls=30, taken_msg_ids=0)
    metrics.queries_dropped(1)
    metrics.redelivered()
    metrics.keys_ignored(2)
    metrics.trace_ignored("header", "traceparent")
    metrics.vmms.exited("exited")
    metrics.warm_vmms({"ready": 2, "starting": 1}, {"used": 1})
    metrics.warm_vmms({"ready": 2, "starting": 0}, {"used": 3})
    metrics.snapshot(0.4, 512 << 20)
    metrics.artifact_copied_bytes(4096)
    metrics.disk(1 << 30, low=False, high=False)
    metrics.bounded({name: Bounded(3, 8) for name in RESOURCES})
    metrics.disk_claimed(16 << 20)
    metrics.journal_bytes(4096)
    metrics.pending_commands(2)
    metrics.vmm_versions([version_state("1.12.1"), version_state("1.13.0", "removed")])
    metrics.slots_waiting(Slots.of(LimitSettings()).counts())
    metrics.ready({"recovered": True})
    metrics.draining(True)
    metrics.loop_lag(0.0001)
    metrics.lanes(busy=2, waiting=1)
    metrics.unfinished(3)
    metrics.outbox_rows(4, held=1)
    metrics.bus_connected(True)
    metrics.instances({Status.RUNNING: 5})
    metrics.vmms.lost(1)
    metrics.vmms.drift("tap", "lost")
    metrics.vmms.quarantined(False)
    metrics.vmms.hung(1)
    metrics.vmms.probed("answered")
    metrics.orphans({"taps": 1})
    metrics.orphan_swept("taps", "removed")
    metrics.sweep_stopped(stopped=False)
    metrics.unrecorded_vmms(1)
    metrics.quarantined({"step": 1})
    metrics.calls({"netlink": 1, "files": 0}, {"netlink": 1, "files": 2})
    return metrics


def test_names_types_and_labels_are_the_contracts() -> None:
    families = list(text_string_to_metric_families(used().render().decode()))

    found = {
        family.name: (family.type, {label for s in family.samples for label in s.labels} - {"le"})
        for family in families
    }
    assert found == CONTRACT


def test_a_counter_follows_a_total_of_another_part_and_never_falls() -> None:
    metrics = Metrics("0.1.0")

    for used, taken in ((2, 20), (5, 50), (4, 40)):
        metrics.warm_vmms({}, {"used": used})
        metrics.calls({}, {"files": used})
        metrics.bus_totals(reconnects=0, permission_errors=0, pulls=0, taken_msg_ids=taken)

    text = metrics.render().decode()
    assert 'hostd_warm_vmm_ends_total{result="used"} 5.0' in text
    assert 'hostd_abandoned_calls_total{kind="files"} 5.0' in text
    assert "hostd_bus_taken_msg_ids_total 50.0" in text


def test_the_operators_page_lists_them_all() -> None:
    page = (ROOT / "docs/operations.md").read_text()

    listed = re.findall(r"^\| `(hostd_\w+)` \| (\w+) \|(.*)\|$", page, re.MULTILINE)
    found = {
        name.removesuffix("_total"): (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in listed
    }
    assert found == CONTRACT


def test_histograms_of_time_begin_at_one_millisecond() -> None:
    text = used().render().decode()

    for name in re.findall(r"# TYPE (\w+_seconds) histogram", text):
        first = re.search(rf'^{name}_bucket{{[^}}]*le="([^"]+)"', text, re.MULTILINE)
        assert first is not None
        assert first[1] == "0.001", name


def test_values_are_what_was_counted() -> None:
    registry = used().registry

    labels = {"type": "StartInstance", "code": "ok"}
    assert registry.get_sample_value("hostd_commands_total", labels) == 1
    assert registry.get_sample_value("hostd_instances", {"status": "running"}) == 5
    assert registry.get_sample_value("hostd_warm_vmms", {"state": "ready"}) == 2
    assert registry.get_sample_value("hostd_warm_vmm_ends_total", {"result": "used"}) == 3
    assert registry.get_sample_value("hostd_instances", {"status": "sleeping"}) == 0
    asleep = {"version": "1.13.0", "state": "sleeping"}
    assert registry.get_sample_value("hostd_vmm_versions", asleep) == 2
    assert registry.get_sample_value("hostd_vmm_versions_in_trouble") == 1
    assert registry.get_sample_value("hostd_capacity_used", {"resource": "uids"}) == 3
    assert registry.get_sample_value("hostd_capacity_limit", {"resource": "slots_boots"}) == 8
    assert registry.get_sample_value("hostd_lanes", {"state": "waiting"}) == 1
    assert registry.get_sample_value("hostd_snapshot_bytes_sum") == 512 << 20


def test_a_total_that_another_part_keeps_is_followed_not_added_up() -> None:
    metrics = used()
    metrics.bus_totals(reconnects=1, permission_errors=5, pulls=31, taken_msg_ids=4)

    assert metrics.registry.get_sample_value("hostd_bus_reconnects_total") == 1
    assert metrics.registry.get_sample_value("hostd_bus_permission_errors_total") == 5


def test_each_public_counter_of_a_part_is_read_by_the_worker() -> None:
    """A counter that only a test reads is exported as a metric, or deleted."""
    counted: dict[str, str] = {}
    read: set[str] = set()
    for path in [*ROOT.glob("worker/**/*.py"), *ROOT.glob("handlers/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute):
                name = ast.unparse(node.target).removeprefix("self.")
                if name.isidentifier() and not name.startswith("_"):
                    counted[name] = f"{path}:{node.lineno}"
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)

    assert {name: where for name, where in counted.items() if name not in read} == {}


def test_a_scrape_shows_each_step_and_commit_before_it() -> None:
    """They are noted first; whether few or many."""
    metrics = Metrics("1")

    shown: list[bytes] = []
    for times in (3, 2 * LATER + 1):
        for _ in range(times):
            metrics.step("vmm", 0.01)
        metrics.commit(0.002)
        shown.append(metrics.render())

    for text, (steps, commits) in zip(shown, ((3, 1), (2 * LATER + 4, 2)), strict=True):
        assert f'hostd_step_duration_seconds_count{{step="vmm"}} {steps}.0'.encode() in text
        assert f"hostd_journal_commit_seconds_count {commits}.0".encode() in text


def test_gauges_are_set_when_scraped() -> None:
    metrics = Metrics("0.1.0")
    metrics.on_collect(lambda: metrics.outbox_rows(7, held=0))

    assert b"hostd_outbox_rows 7.0" in metrics.render()


def test_two_workers_in_one_process_do_not_share_a_registry() -> None:
    one, other = Metrics("1"), Metrics("2")
    one.redelivered()

    assert other.registry.get_sample_value("hostd_redeliveries_total") == 0


def test_each_alert_reads_exported_metrics_and_has_a_case_that_fires() -> None:
    rules = (ROOT / "deploy/prometheus/hostd.rules.yml").read_text()
    cases = (ROOT / "deploy/prometheus/hostd.test.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    read = {re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"\bhostd_\w+", rules)}

    silent = re.findall(r"alertname: (\w+), exp_alerts: \[\]}", cases)
    assert set(silent) == set(alerts)
    firing = re.findall(r"alertname: (\w+)\n +exp_alerts:\n", cases)
    assert sorted(set(firing)) == sorted(alerts)
    assert read <= set(CONTRACT)


def test_each_reason_not_to_be_ready_has_an_alert() -> None:
    """But for a drain, which an operator wants."""
    rules = (ROOT / "deploy/prometheus/hostd.rules.yml").read_text()
    checks = set(re.findall(r'^ +"(\w+)": ', inspect.getsource(Worker.checks), re.MULTILINE))
    assert len(checks) > 10

    own_alert = {
        "connected": "HostdBusDisconnected",
        "has_disk_space": "HostdDiskFull",
        "below_disk_watermark": "HostdDiskAboveWatermark",
        "launches_succeed": "HostdLaunchesQuarantined",
        "calls_return": "HostdHungCalls",
        "has_vmm_versions": "HostdVmmVersionInTrouble",
    }
    assert all(f"alert: {alert}\n" in rules for alert in own_alert.values())
    named = re.findall(r'hostd_ready\{check=~"([^"]+)"\}', rules)
    common = {check for names in named for check in names.split("|")}
    assert common.isdisjoint(own_alert)
    assert common | own_alert.keys() | {"not_draining"} == checks


def test_what_an_alert_sees_grow_is_there_before_it_happens() -> None:
    """An increase from no series to 1 is none for Prometheus."""
    rules = (ROOT / "deploy/prometheus/hostd.rules.yml").read_text()
    samples = [sample for family in Metrics("1").registry.collect() for sample in family.samples]
    watched = re.findall(r"increase\((hostd_\w+)(?:\{(\w+)(=~?)\"([^\"]+)\"\})?\[", rules)
    assert len(watched) >= 4

    for name, label, operator, value in watched:
        found = {sample.labels.get(label, "") for sample in samples if sample.name == name}
        assert found, name
        for each in value.split("|") if operator else [".*"]:
            assert any(re.fullmatch(each, have) for have in found), (name, each)


def test_each_command_has_its_series_of_success_and_of_the_hosts_faults() -> None:
    registry = Metrics("1").registry

    for request in get_args(Request):
        for code in ("ok", "host_fault", "internal"):
            labels = {"type": request.__name__, "code": code}
            assert registry.get_sample_value("hostd_commands_total", labels) == 0


async def test_loop_lag_is_sampled_and_sees_a_blocked_loop() -> None:
    metrics = Metrics("1")
    task = asyncio.create_task(sample_loop_lag(metrics, interval_s=0.001))
    async with asyncio.timeout(5):
        while not metrics.registry.get_sample_value("hostd_loop_lag_seconds_count"):
            await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.03
    while loop.time() < until:  # the fault itself: the loop does not get a turn
        pass
    before = metrics.registry.get_sample_value("hostd_loop_lag_seconds_count")
    async with asyncio.timeout(5):
        while metrics.registry.get_sample_value("hostd_loop_lag_seconds_count") == before:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert (metrics.registry.get_sample_value("hostd_loop_lag_seconds_sum") or 0) >= 0.025
