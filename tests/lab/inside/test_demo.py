"""`hostd demo` with the Linux guest, as `make demo` runs it in the lab."""

import json
import subprocess
from pathlib import Path


def test_the_demo_reports_every_step_and_leaves_nothing() -> None:
    demo = subprocess.run(
        ["hostd", "demo", "--here", "--json"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert demo.returncode == 0, demo.stderr
    summary = json.loads(demo.stdout)
    facts = {step["what"]: step["facts"] for step in summary["steps"]}
    assert (summary["where"], summary["guest"]) == ("in the lab", "linux")
    assert "limits enforced" in facts["worker ready"]
    assert "same boot id, clock within" in facts["guest state"]
    assert "unchanged: 0 resources" in facts["inventory"]
    assert list(Path("/var/tmp").glob("hostd-demo-*")) == []
    assert list(Path("/sys/fs/cgroup").glob("hostd-demo-*")) == []
