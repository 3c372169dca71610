"""Everything that can be used up has a gauge; so has each setting that is such a limit."""

import re
from pathlib import Path
from typing import Final

from worker.meters.resources import RESOURCES, Bounded
from worker.metrics import Metrics
from worker.settings import keys

ROOT = Path(__file__).parents[3]
# Settings with a number that limit nothing of the host as a whole, each with the reason.
NO_RESOURCE: Final = {
    "vmm.uid_base": "the first of the uids",
    "vmm.ready_timeout_s": "a time",
    "vmm.api_timeout_s": "a time",
    "vmm.snapshot_timeout_s": "a time",
    "vmm.probe_interval_s": "a time",
    "vmm.log_bytes": "of one file",
    "vmm.max_file_mib": "of one file",
    "network.max_flows": "of one tenant, counted in the kernel",
    "limits.max_drain_s": "a time",
    "limits.max_stop_s": "a time",
    "limits.max_artifact_mib": "of one file",
    "limits.disk_low_percent": "ends what disk_high_percent began",
    "limits.shutdown_s": "a time",
    "limits.retry_budget_s": "a time of one command",
    "sweep.grace_s": "a time",
    "trace.sample_ratio": "a part of all",
}


def test_each_setting_that_bounds_the_host_has_a_gauge() -> None:
    numbers = {key.dotted for key in keys() if key.type in (int, float)}
    limits = {setting for settings in RESOURCES.values() for setting in settings}

    assert limits | NO_RESOURCE.keys() == numbers
    assert not limits & NO_RESOURCE.keys()


def test_a_time_is_none_that_can_be_used_up() -> None:
    for name, reason in NO_RESOURCE.items():
        assert name.endswith("_s") == reason.startswith("a time"), name


def test_the_operators_page_lists_each_resource() -> None:
    page = (ROOT / "docs/operations.md").read_text()

    section = page.split("### Resources")[1].split("\n#")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert listed == [*RESOURCES]


def test_the_number_of_series_is_fixed() -> None:
    metrics = Metrics("1")
    metrics.bounded({"tenant-acme": Bounded(1, 2), "uids": Bounded(3, 4)})

    text = metrics.render().decode()
    assert "acme" not in text
    assert 'hostd_capacity_used{resource="uids"} 3.0' in text
    assert 'hostd_capacity_limit{resource="uids"} 4.0' in text
