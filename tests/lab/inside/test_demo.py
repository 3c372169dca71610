"""`hostd demo` with the Linux guest, as `make demo` runs it in the lab."""

import json
import subprocess
from pathlib import Path


def test_the_demo_tells_its_story_and_leaves_nothing() -> None:
    demo = subprocess.run(
        ["hostd", "demo", "--here", "--json"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert demo.returncode == 0, demo.stderr
    told = json.loads(demo.stdout)
    facts = {step["what"]: step["facts"] for step in told["steps"]}
    assert (told["where"], told["guest"]) == ("in the lab", "linux")
    assert "limits in force" in facts["worker ready"]
    assert "same boot id, clock within" in facts["the guest remembers"]
    assert "the same before and after: 0 things" in facts["inventory"]
    assert list(Path("/var/tmp").glob("hostd-demo-*")) == []
    assert list(Path("/sys/fs/cgroup").glob("hostd-demo-*")) == []
